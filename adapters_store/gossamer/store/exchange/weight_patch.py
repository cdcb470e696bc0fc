"""Sparse weight patches, as TRL syncs them into vLLM: positions and REPLACEMENT values.

A safetensors file with two tensors for each changed parameter, both [nnz]: flat row-major
positions and the new values, in bfloat16 or whatever the model is in. Two layouts are read:
`<name>.indices` int32 and `<name>.values` (as TRL describes its files; written here as well), and
`<name>.idx` and `<name>.val` (as its later code writes them), where `encoding` in the file's
metadata says whether positions are stored as they are (`raw`) or as the gaps between them
(`gap_delta`: position - previous position - 1).
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
from numpy.typing import NDArray

from gossamer.store.delta import Delta, DeltaSet
from gossamer.store.errors import AdapterFileError, printable
from gossamer.store.exchange.adding import Absorption, added, check_base
from gossamer.store.exchange.base import BaseWeights
from gossamer.store.exchange.building import element_delta
from gossamer.store.exchange.checkpoint_names import CONFIG
from gossamer.store.exchange.files import Files
from gossamer.store.exchange.formats import (
    Exported,
    ExportOptions,
    Format,
    Imported,
    Importer,
    ImportOptions,
)
from gossamer.store.exchange.names import check_names, shape_of
from gossamer.store.exchange.records import imported, recorded
from gossamer.store.exchange.shards import is_checkpoint
from gossamer.store.exchange.tensors import TensorFile
from gossamer.store.exchange.writing import Planned, write_tensors
from gossamer.store.format.container import invalid, parse_json
from gossamer.store.values import from_carrier

_NAME = "weight-patch"
_KIND, _ANCHOR = "sparse_weight_patch", "anchor_checkpoint"
_FILE = "patch.safetensors"
#: Positions and values.
_LAYOUTS = ((".indices", ".values"), (".idx", ".val"))
#: What TRL's first code puts into a patch without changes: safetensors wants a tensor.
_EMPTY = "__empty_delta__"
#: Positions beyond are written as int64.
_INT32 = 2**31


@dataclass(frozen=True)
class _Entry:
    """The names of a parameter's two tensors."""

    indices: str
    values: str


def _detect(files: Files) -> bool:
    names = [name for name in files.paths if name.endswith(".safetensors")]
    if len(names) != 1 or "adapter_config.json" in files:
        return False
    try:
        with files.tensors(names[0]) as tensors:
            if tensors.metadata.get("format") in (_KIND, _ANCHOR):
                whole = is_checkpoint(files) and CONFIG in files
                return not (whole and _is_anchor(tensors.metadata))
            return bool(tensors.infos) and bool(_entries(tensors))
    except (AdapterFileError, OSError):  # whoever reads it says what is wrong with it
        return False


def _read(files: Files, base: BaseWeights, options: ImportOptions) -> Imported:
    names = [name for name in files.paths if name.endswith(".safetensors")]
    if len(names) != 1:
        invalid(f"a patch is one safetensors file, these are {len(names)}")
    with files.tensors(names[0]) as tensors:
        if _is_anchor(tensors.metadata):
            _refuse_anchor()
        entries = _entries(tensors)
        gaps = _has_gaps(tensors)
        _check_listed(tensors.metadata, entries)
        counts = {name: _count(tensors, name, entry) for name, entry in entries.items()}
        filled = [name for name in sorted(counts, key=str.encode) if counts[name]]
        unknown = [name for name in counts if shape_of(base, name) is None]
        made_for = printable(tensors.metadata.get("base_model_id", ""))
        check_names(base, dict.fromkeys([*unknown, *filled]), made_for)
        deltas: dict[str, Delta] = {}
        for name in filled:
            delta = _delta(tensors, name, entries[name], base, options, gaps=gaps)
            if delta.nnz:
                deltas[name] = delta
        metadata = dict(tensors.metadata)
    unchanged = sum(counts.values()) - sum(delta.nnz for delta in deltas.values())
    return imported(
        _NAME,
        base,
        made_for,
        deltas,
        record=recorded(metadata, ("model_version", "base_model_id", "encoding")),
        facts={"unchanged_dropped": unchanged, "empty_skipped": len(counts) - len(filled)},
        warnings=_step_warnings(metadata),
        fingerprint=base.fingerprint,
    )


def _is_anchor(metadata: Mapping[str, str]) -> bool:
    """Whether a file holds whole weights, that later patches are counted from."""
    return metadata.get("sparse") == "False" or metadata.get("format") == _ANCHOR


def _refuse_anchor() -> NoReturn:
    raise AdapterFileError(
        "unsupported_file",
        "this is an anchor, which holds whole weights: put it into a folder with config.json as "
        "model.safetensors, and import that as a checkpoint",
    )


def _has_gaps(tensors: TensorFile) -> bool:
    """Whether positions are stored as gaps, in a file of one layout.

    Raises:
        AdapterFileError: `unsupported_file`, another encoding.
    """
    long, short = (any(name.endswith(ends) for name in tensors.infos) for ends in _LAYOUTS)
    encoding = tensors.metadata.get("encoding", "gap_delta" if short else "raw")
    if long and encoding == "gap_delta":
        raise AdapterFileError(
            "unsupported_file",
            f"the positions are encoded as gap_delta, which is read of {_LAYOUTS[1][0]} only, not "
            f"of {_LAYOUTS[0][0]}",
        )
    if encoding not in ("raw", "gap_delta"):
        raise AdapterFileError(
            "unsupported_file",
            f"the positions are encoded as {printable(encoding)}; raw and gap_delta can be read",
        )
    return short and encoding == "gap_delta"


def _entries(tensors: TensorFile) -> dict[str, _Entry]:
    """By parameter.

    Raises:
        AdapterFileError: a tensor belongs to nothing, one of a pair is missing, or the file has
            both layouts: what encodes positions is said once for all.
    """
    found: dict[str, _Entry] = {}
    first: tuple[str, str] | None = None
    for key in tensors.infos:
        if key == _EMPTY:
            continue
        layout = next((layout for layout in _LAYOUTS if key.endswith(layout)), None)
        if layout is None:
            invalid(f"{printable(key)} belongs to nothing in this format", key)
        first = first or layout
        if layout != first:
            invalid(f"{printable(key)} is in another layout than the tensors before it", key)
        end = next(end for end in layout if key.endswith(end))
        name = key.removesuffix(end)
        entry = _Entry(*(name + end for end in layout))
        for half in (entry.indices, entry.values):
            if half not in tensors:
                invalid(f"{printable(half)} is missing, and {printable(key)} is there", half)
        found[name] = entry
    return found


def _check_listed(metadata: Mapping[str, str], entries: Mapping[str, _Entry]) -> None:
    """The parameters are those that the file says, where it does."""
    text = metadata.get("changed_params")
    if text is None:
        return
    listed = parse_json(text, "changed_params")
    if not isinstance(listed, list) or not all(isinstance(name, str) for name in listed):
        invalid("changed_params is no list of names")
    for name in sorted(set(listed) ^ entries.keys()):
        where = "the file does not hold it" if name in listed else "changed_params does not list it"
        invalid(f"{printable(name)}: {where}", name)


def _count(tensors: TensorFile, name: str, entry: _Entry) -> int:
    there, values = tensors.info(entry.indices).shape, tensors.info(entry.values).shape
    if len(values) != 1 or there != values:
        invalid(
            f"{printable(name)} has positions of shape {list(there)} and values of shape "
            f"{list(values)}; both must be lists of one length",
            name,
        )
    return values[0]


def _delta(
    tensors: TensorFile,
    name: str,
    entry: _Entry,
    base: BaseWeights,
    options: ImportOptions,
    *,
    gaps: bool,
) -> Delta:
    """What the patch changes, without the entries that it leaves as they are.

    Raises:
        AdapterFileError
    """
    shape = base.table[name]
    size = math.prod(shape)
    positions = tensors.read_positions(entry.indices)
    if gaps:
        outside = (positions < 0) | (positions >= size)
        if outside.any():  # so that their sums stay far from the end of int64
            at = int(outside.argmax())
            message = f"gap {positions[at]} (entry {at}) is not in [0, {size})"
            raise AdapterFileError("invalid_adapter_file", message, tensor=name, position=at)
        positions = np.cumsum(positions + 1) - 1
    # Checked before they are used to read the base: in range, none twice, finite.
    values, dtype = tensors.read_values(entry.values)
    placed = element_delta(name, shape, positions, values, dtype, duplicates="refuse")
    stored, own = base.read(name)
    before = from_carrier(stored.reshape(-1)[placed.positions], own)
    difference = placed.values_f32() - before
    changed = difference != 0
    return element_delta(
        name,
        shape,
        placed.positions[changed],
        difference[changed],
        "F32",
        rounded_to=options.value_dtype,
    )


def _step_warnings(metadata: Mapping[str, str]) -> tuple[str, ...]:
    version = metadata.get("model_version", "")
    if not version.isascii() or not version.isdigit() or int(version[:18]) <= 1:
        return ()
    return (
        f"this is step {version[:18]} of a run: it holds what that step changed, on top of the "
        "steps before, which are not in it",
    )


def _write(
    delta_set: DeltaSet, base: BaseWeights, folder: Path, options: ExportOptions
) -> Exported:
    check_base(delta_set, base)
    absorption = Absorption()
    plans: list[Planned] = []
    names: list[str] = []
    total = 0
    for name, delta in sorted(delta_set.deltas.items(), key=lambda item: item[0].encode()):
        stored, own = base.read(name)
        positions, difference = delta.elements()
        target = options.value_dtype or own
        values, same = added(name, stored.reshape(-1)[positions], own, difference, target)
        absorption.count(name, difference, same)
        if same.all():
            continue
        wide = math.prod(delta.shape) > _INT32
        kept = positions[~same].astype("<i8" if wide else "<i4")
        count = kept.size
        total += count
        names.append(name)
        plans += [
            Planned(name + ".indices", "I64" if wide else "I32", (count,), partial(_given, kept)),
            Planned(name + ".values", target, (count,), partial(_given, values[~same])),
        ]
    if not plans:
        plans.append(Planned(_EMPTY, "I32", (1,), lambda: np.zeros(1, "<i4")))
    write_tensors(folder / _FILE, plans, _metadata(base, names, total))
    facts = {"nnz": total, "parameters": len(names), **absorption.facts()}
    dtype = options.value_dtype or "the base's dtype"
    return Exported((_FILE,), facts, absorption.warnings(dtype))


def _given(array: NDArray[Any]) -> NDArray[Any]:
    return array


def _metadata(base: BaseWeights, names: list[str], changed: int) -> dict[str, str]:
    """What TRL's `PatchMetadata` has, of its first and of its later code."""
    elements = sum(math.prod(shape) for shape in base.parameters.values())
    return {
        "format": _KIND,
        "version": "1",
        "sparse": "True",
        "model_version": "1",
        "prev_model_version": "0",
        "anchor_step": "0",
        "base_model_id": base.name,
        "num_changed_params": str(len(names)),
        "total_changed_elements": str(changed),
        "total_elements": str(elements),
        "sparsity": str(1.0 - changed / max(elements, 1)),
        "encoding": "raw",
        "changed_params": json.dumps(names),
    }


FORMAT = Format(
    _NAME,
    "sparse weight patch (TRL, vLLM): replacement values",
    "https://huggingface.co/blog/delta-weight-sync",
    importer=Importer(_detect, _read),
    exporter=_write,
)
