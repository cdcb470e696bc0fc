"""peft-sparta: coordinates and values of every parameter of the model."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gossamer.store.delta import Delta, DeltaSet
from gossamer.store.errors import printable
from gossamer.store.exchange.adding import check_base
from gossamer.store.exchange.base import BaseWeights, required_folder
from gossamer.store.exchange.files import Files
from gossamer.store.exchange.formats import (
    Exported,
    ExportOptions,
    Format,
    Imported,
    Importer,
    ImportOptions,
)
from gossamer.store.exchange.sparse_entries import (
    BASE_KEY,
    CONFIG,
    SparseEntry,
    model_config,
    read_entries,
    refuse_additions,
)
from gossamer.store.exchange.tensors import DTYPES, TensorFile
from gossamer.store.exchange.writing import Planned, path_warnings, write_json, write_tensors
from gossamer.store.format.container import invalid
from gossamer.store.values import ValueDtype, to_carrier

_NAME = "peft-sparta"
_DELTAS = "sparse_deltas.safetensors"
_INDICES, _VALUES = "indices.", "deltas."


def _detect(files: Files) -> bool:
    return _DELTAS in files


def _read(files: Files, base: BaseWeights, options: ImportOptions) -> Imported:
    config = model_config(files)
    with files.tensors(_DELTAS) as tensors:
        return read_entries(_NAME, base, _entries(tensors), config, options)


def _entries(tensors: TensorFile) -> dict[str, SparseEntry]:
    """By parameter; nothing is read yet.

    Raises:
        AdapterFileError: a tensor belongs to nothing, or one of a pair is missing.
    """
    found: dict[str, SparseEntry] = {}
    for key, info in tensors.infos.items():
        if not key.startswith((_INDICES, _VALUES)):
            invalid(f"{printable(key)} belongs to nothing in this format", key)
        name = key.partition(".")[2]
        indices, values = _INDICES + name, _VALUES + name
        for half in (indices, values):
            if half not in tensors:
                invalid(f"{printable(half)} is missing, and {printable(key)} is there", half)
        if key == indices:
            found[name] = SparseEntry(
                info.shape,
                tensors.info(values).shape,
                partial(tensors.read_positions, indices),
                partial(tensors.read_values, values),
            )
    if not found:
        invalid(f"{_DELTAS} holds no tensors")
    return found


def _write(
    delta_set: DeltaSet, base: BaseWeights, folder: Path, options: ExportOptions
) -> Exported:
    check_base(delta_set, base)
    own = required_folder(base)
    dtype = options.value_dtype or "F32"
    plans: list[Planned] = []
    for name, shape in base.parameters.items():  # its loader looks every one of them up
        delta = delta_set.deltas.get(name)
        count = 0 if delta is None else delta.nnz
        indices, values = partial(_indices, delta, len(shape)), partial(_values, delta, dtype)
        plans.append(Planned(_INDICES + name, "I32", (count, len(shape)), indices))
        plans.append(Planned(_VALUES + name, dtype, (count,), values))
    write_tensors(folder / _DELTAS, plans)
    config: Mapping[str, Any] = Files.at(own).json(CONFIG)
    write_json(folder / CONFIG, {**config, BASE_KEY: str(own)})
    warnings = path_warnings(CONFIG, BASE_KEY)
    return Exported((CONFIG, _DELTAS), {"nnz": delta_set.nnz}, warnings)


def _indices(delta: Delta | None, dimensions: int) -> NDArray[np.int32]:
    """int32 [nnz, dimensions]"""
    if delta is None:
        return np.empty((0, dimensions), "<i4")
    positions = delta.elements()[0]
    return np.stack(np.divmod(positions, delta.shape[1]), axis=1).astype("<i4")


def _values(delta: Delta | None, dtype: ValueDtype) -> NDArray[Any]:
    """[nnz] in the carrier of `dtype`"""
    if delta is None:
        return np.empty(0, DTYPES[dtype])
    return to_carrier(delta.elements()[1], dtype)


FORMAT = Format(
    _NAME,
    "SpaRTA of peft-sparta",
    "https://github.com/jmriosal/peft-sparta",
    importer=Importer(
        _detect,
        _read,
        uploadable=True,
        reads=(CONFIG, _DELTAS),
        look=refuse_additions,
    ),
    exporter=_write,
)
