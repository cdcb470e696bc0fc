"""IBM's SpaRTA: what peft-sparta writes, in a pickle."""

from __future__ import annotations

from typing import Any

from gossamer.store.exchange.base import BaseWeights
from gossamer.store.exchange.files import Files
from gossamer.store.exchange.formats import Format, Imported, Importer, ImportOptions
from gossamer.store.exchange.pickles import PickledTensor, floats, integers, named, unpickled
from gossamer.store.exchange.sparse_entries import SparseEntry, model_config, read_entries
from gossamer.store.format.container import invalid

_NAME = "sparta-pickle"
_DELTAS = "sparse_deltas.pt"
_INDICES, _VALUES = "indices", "deltas"


def _detect(files: Files) -> bool:
    return _DELTAS in files


def _read(files: Files, base: BaseWeights, options: ImportOptions) -> Imported:
    config = model_config(files)
    found = unpickled(files, _DELTAS, options)
    if found.keys() != {_INDICES, _VALUES}:
        invalid(f"{_DELTAS} must hold {_INDICES!r} and {_VALUES!r}")
    indices, values = (named(found[key], f"{key!r}") for key in (_INDICES, _VALUES))
    for name in indices.keys() ^ values.keys():
        invalid(f"{_DELTAS} has only one of {_INDICES} and {_VALUES} for it", name)
    if not indices:
        invalid(f"{_DELTAS} holds no tensors")
    entries = {name: _entry(name, indices[name], values[name]) for name in indices}
    return read_entries(_NAME, base, entries, config, options)


def _entry(name: str, indices: Any, values: Any) -> SparseEntry:
    """Both are in memory already: a pickle is read whole."""
    if not isinstance(indices, PickledTensor) or not isinstance(values, PickledTensor):
        invalid(f"{_DELTAS} holds something else than two tensors for it", name)
    return SparseEntry(
        indices.array.shape,
        values.array.shape,
        lambda: integers(indices, name, _INDICES),
        lambda: floats(values, name, _VALUES),
    )


FORMAT = Format(
    _NAME,
    "SpaRTA of IBM (pickle)",
    "https://github.com/IBM/SpaRTA",
    importer=Importer(_detect, _read),
)
