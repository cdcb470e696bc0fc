"""Sparse deltas of peft-sparta: coordinates and values of each parameter, from whatever file."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from numpy.typing import NDArray

from gossamer.store.delta import Delta
from gossamer.store.errors import AdapterFileError, printable
from gossamer.store.exchange.base import BaseWeights
from gossamer.store.exchange.building import check_count, element_delta, row_major
from gossamer.store.exchange.files import Files
from gossamer.store.exchange.formats import Imported, ImportOptions
from gossamer.store.exchange.names import check_names, refuse_module, shape_of
from gossamer.store.exchange.records import counted, imported, made_for, recorded
from gossamer.store.format.container import invalid
from gossamer.store.values import ValueDtype

CONFIG = "config.json"
#: In the configuration: what the loader takes the base from.
BASE_KEY = "sparta_pretrained_model"
#: The classification head of transformers' models; no base of ours has one.
_HEAD = "score.weight"
#: Files that hold what such an adapter adds to the model, and their ends.
_BESIDE = {"head_init": "a classification head", "new_embeddings_init": "embeddings of new tokens"}
_ENDS = (".safetensors", ".pt")


@dataclass(frozen=True)
class SparseEntry:
    """The sparse difference of one parameter, not read yet.

    Attributes:
        indices_shape: [nnz, dimensions of the parameter].
        values_shape: [nnz].
        indices: coordinates, int64 of that shape.
        values: in their carrier, and its dtype.
    """

    indices_shape: tuple[int, ...]
    values_shape: tuple[int, ...]
    indices: Callable[[], NDArray[Any]]
    values: Callable[[], tuple[NDArray[Any], ValueDtype]]


def refuse_additions(files: Files) -> None:
    """Refuse an adapter that adds something to the model, which is in files of its own.

    Raises:
        AdapterFileError: `unsupported_module`
    """
    for stem, what in _BESIDE.items():
        for name in (stem + end for end in _ENDS):
            if name in files:
                message = f"{name} holds {what}, which this server cannot apply"
                raise AdapterFileError("unsupported_module", message, tensor=name)


def model_config(files: Files) -> dict[str, Any]:
    """The configuration beside the deltas, of the model that they were made from; may be missing.

    Raises:
        AdapterFileError: malformed; `unsupported_module` where there are files for what the
            adapter adds to the model.
    """
    refuse_additions(files)
    return files.json(CONFIG) if CONFIG in files else {}


def read_entries(
    form: str,
    base: BaseWeights,
    entries: Mapping[str, SparseEntry],
    config: Mapping[str, Any],
    options: ImportOptions,
) -> Imported:
    """The adapter of a file that lists parameters, most of them without an entry.

    Args:
        form: the format's name.
        entries: by the name of the parameter; they are checked whole before one is read.
        config: `model_config`.

    Raises:
        AdapterFileError: the entries are malformed, or for another base; `unsupported_module`, a
            parameter that no delta may change has entries.
    """
    base_name = made_for(config, BASE_KEY)
    if _HEAD in entries:
        refuse_module(_HEAD)
    for name, entry in entries.items():
        _check_shapes(base, name, entry)
    filled = sorted((name for name in entries if entries[name].values_shape[0]), key=str.encode)
    unknown = [name for name in entries if shape_of(base, name) is None]
    check_names(base, dict.fromkeys([*unknown, *filled]), base_name)
    _check_hidden_size(base, config)
    deltas = {name: _delta(name, base.table[name], entries[name], options) for name in filled}
    return imported(
        form,
        base,
        base_name,
        deltas,
        record=recorded(config, (BASE_KEY, "transformers_version")),
        facts={"empty_skipped": len(entries) - len(deltas)},
        warnings=_unlisted(base, entries),
    )


def _check_shapes(base: BaseWeights, name: str, entry: SparseEntry) -> None:
    there, values = entry.indices_shape, entry.values_shape
    if len(values) != 1 or len(there) != 2 or there[0] != values[0]:
        invalid(
            f"{printable(name)} has indices of shape {list(there)} and deltas of shape "
            f"{list(values)}, not [entries, dimensions] and [entries]",
            name,
        )
    own = shape_of(base, name)
    if own is None:
        return
    check_count(name, own, values[0])
    if there[1] != len(own):
        invalid(
            f"{printable(name)} has indices of {there[1]} dimensions, the parameter {len(own)}",
            name,
        )


def _check_hidden_size(base: BaseWeights, config: Mapping[str, Any]) -> None:
    """Nothing else in the file says a shape, and small positions fit into any larger weight."""
    hidden = config.get("hidden_size")
    if isinstance(hidden, int) and not any(hidden in shape for shape in base.table.values()):
        raise AdapterFileError(
            "base_model_mismatch",
            f"the adapter is for a model of hidden_size {printable(str(hidden))} ({CONFIG}); no "
            f"weight of the base {base.name} has such a side",
        )


def _delta(name: str, shape: tuple[int, int], entry: SparseEntry, options: ImportOptions) -> Delta:
    positions = row_major(name, shape, *entry.indices().T)
    values, dtype = entry.values()
    return element_delta(
        name,
        shape,
        positions,
        values,
        dtype,
        duplicates="refuse",  # the loader writes by index: which of two stays is not defined
        rounded_to=options.value_dtype,
    )


def _unlisted(base: BaseWeights, entries: Mapping[str, SparseEntry]) -> tuple[str, ...]:
    missing = len(base.table.keys() - entries.keys())
    if not missing:
        return ()
    weights = counted(missing, "linear weight", "linear weights")
    return (
        f"the file does not list {weights} of the base {base.name}; peft-sparta lists all, so the "
        "adapter may be for another model",
    )
