"""From foreign files to the packed file."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

from gossamer.store.delta import DeltaSet
from gossamer.store.errors import AdapterFileError, DeltaError, printable
from gossamer.store.exchange.base import BaseWeights
from gossamer.store.exchange.files import Files
from gossamer.store.exchange.formats import ImportOptions
from gossamer.store.exchange.registry import detect, importers
from gossamer.store.format import Coding, Limits, Written, write
from gossamer.store.format.checks import too_large
from gossamer.store.format.container import CONVERT
from gossamer.store.format.writer import Sink

_TENSORS = ".safetensors"
#: The most that an item of an upload's tensors takes in memory until the packed file is written.
#: Measured, with all entries in one weight: 46 bytes an entry of SHiRA and 45 of SFT, to sort them
#: and add some up, and 37 of peft-sparta; an entry is two items of SFT, three of the others.
_ITEM_BYTES = 24
#: Of an upload's tensor file; 30,000 tensors need less. Parsing one of 13 MiB held up the other
#: threads of the process for 0.45 s.
_MAX_HEADER_BYTES = 2 << 20


@dataclass(frozen=True)
class Packed:
    """An upload that was another library's.

    Attributes:
        format: its name in the registry.
        warnings: for its sender, one sentence each.
    """

    format: str
    warnings: tuple[str, ...]


def pack(delta_set: DeltaSet, target: Path | Sink, *, coding: Coding = "auto") -> Written:
    """Write what an importer made of somebody's files.

    Raises:
        AdapterFileError: the packed file cannot hold it (a record too long or deep, say).
        OSError: the path cannot be written.
    """
    try:
        return write(delta_set, target, coding=coding)
    except DeltaError as error:
        raise AdapterFileError(
            "invalid_adapter_file", error.message, tensor=error.tensor, position=error.position
        ) from error


def pack_upload(files: Files, base: BaseWeights, target: Sink, limits: Limits) -> Packed:
    """Write the files that somebody sent as the packed adapter that they say.

    Only formats that are safe to take from strangers: none is a pickle, and none needs the base's
    weights. What they would take in memory is bounded by their headers before a tensor is read.

    Raises:
        AdapterFileError: they are none of those formats, or break the rules of theirs.
        what `target.write` raises.
    """
    for filename in files.paths:  # before a format is looked for in one
        if filename.endswith(_TENSORS):
            _check_header(files.path(filename), filename)
    name = uploadable_format(files)
    importer = importers()[name]
    _check_memory(files, importer.reads, limits)
    imported = importer.read(files, base, ImportOptions())
    pack(imported.delta_set, target)
    warnings = [f"The files were taken as {name} and converted."]
    warnings += [f"{text[:1].upper()}{text[1:].removesuffix('.')}." for text in imported.warnings]
    if unread := sorted(set(files.paths) - set(importer.reads)):
        warnings.append(f"Not read: {', '.join(map(printable, unread))}.")
    return Packed(name, tuple(warnings))


def uploadable_format(files: Files) -> str:
    """The name of the files' format.

    Raises:
        AdapterFileError: `unsupported_file`; it says so where a command could read them.
    """
    try:
        return detect(files, uploadable=True)
    except AdapterFileError as error:
        other = next((n for n, importer in importers().items() if importer.detect(files)), None)
        if other is None:
            raise
        raise AdapterFileError(
            "unsupported_file",
            f"these files are {other}, which is not converted here; {CONVERT}",
        ) from error


def _check_memory(files: Files, names: tuple[str, ...], limits: Limits) -> None:
    """Whether what the files hold can be converted in the memory that an upload may take.

    Raises:
        AdapterFileError: it does not, or a header is malformed.
    """
    needed = 0
    for name in names:
        if name not in files or not name.endswith(_TENSORS):
            continue
        with files.tensors(name) as tensors:
            items = sum(math.prod(info.shape) for info in tensors.infos.values())
        needed += items * _ITEM_BYTES
    if needed > limits.max_decoded_bytes:
        most = limits.max_decoded_bytes
        too_large(f"to convert it takes up to {needed} bytes of memory, at most {most} are allowed")


def _check_header(path: Path, name: str) -> None:
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
    # What claims more than there is has no such header, which its reader tells more exactly.
    if _MAX_HEADER_BYTES < length <= path.stat().st_size:
        most = _MAX_HEADER_BYTES
        too_large(f"the header of {printable(name)} has {length} bytes, at most {most} are allowed")
