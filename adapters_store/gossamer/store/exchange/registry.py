"""The formats that are known, and which of them some files are."""

from __future__ import annotations

from collections.abc import Mapping

from gossamer.store.errors import AdapterFileError, printable
from gossamer.store.exchange import (
    checkpoint,
    composable_sft,
    merged,
    peft_sft,
    peft_shira,
    peft_sparta,
    peft_supertuning,
    sparta_pickle,
    weight_patch,
)
from gossamer.store.exchange.files import Files
from gossamer.store.exchange.formats import Exporter, Format, Importer

#: In the order in which they are tried.
_ROWS: tuple[Format, ...] = (
    peft_sparta.FORMAT,
    peft_shira.FORMAT,
    peft_supertuning.FORMAT,
    peft_sft.FORMAT,
    sparta_pickle.FORMAT,
    composable_sft.FORMAT,
    weight_patch.FORMAT,
    checkpoint.FORMAT,
    merged.FORMAT,
)
FORMATS: Mapping[str, Format] = {row.name: row for row in _ROWS}


def importers(*, uploadable: bool = False) -> Mapping[str, Importer]:
    """The formats that can be read; with `uploadable`, those that are also taken over HTTP."""
    return {
        name: row.importer
        for name, row in FORMATS.items()
        if row.importer is not None and (row.importer.uploadable or not uploadable)
    }


def exporters() -> Mapping[str, Exporter]:
    """The formats that can be written."""
    return {name: row.exporter for name, row in FORMATS.items() if row.exporter is not None}


def detect(files: Files, *, uploadable: bool = False) -> str:
    """The format of some files, by its name.

    Raises:
        AdapterFileError: `unsupported_file`, none of the known ones.
    """
    known = importers(uploadable=uploadable)
    for name, importer in known.items():
        if importer.detect(files):
            return name
    given = ", ".join(sorted(map(printable, files.paths))[:5]) or "nothing"
    raise AdapterFileError(
        "unsupported_file",
        f"these files ({given}) are none of the formats that can be read here: {', '.join(known)}",
    )
