"""composable-sft (lottery-ticket sparse fine-tuning): column-major positions, in a pickle.

`pytorch_diff.bin` holds `{"diffs": {parameter: difference}, "abs": {parameter: tensor}}`; the
latter is what replaces a parameter whole, such as a head for a task. Earlier versions call them
`"body"` and `"head"`, and leave the latter out where there is none. A difference is
`{"size", "index_steps", "values"}`: the steps between ascending positions, where the FIRST
dimension runs fastest (index = row + column * rows); or, in earlier files, a sparse tensor of
PyTorch.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gossamer.store.delta import Delta
from gossamer.store.errors import AdapterFileError
from gossamer.store.exchange.base import BaseWeights
from gossamer.store.exchange.building import element_delta, row_major
from gossamer.store.exchange.files import Files
from gossamer.store.exchange.formats import Format, Imported, Importer, ImportOptions
from gossamer.store.exchange.names import check_names, shape_of
from gossamer.store.exchange.pickles import PickledSparse, floats, integers, named, unpickled
from gossamer.store.exchange.records import imported, sum_warnings
from gossamer.store.format.container import invalid
from gossamer.store.values import ValueDtype

_NAME = "composable-sft"
_FILE = "pytorch_diff.bin"
#: What holds the differences, and what holds whole parameters: now, and in earlier versions.
_LAYOUTS = (("diffs", "abs"), ("body", "head"))
_ENCODED = {"size", "index_steps", "values"}
_MAX_DIMENSIONS = 8
_MAX_SIDE = 2**62


def _detect(files: Files) -> bool:
    return _FILE in files


def _read(files: Files, base: BaseWeights, options: ImportOptions) -> Imported:
    found = unpickled(files, _FILE, options)
    body = _differences(found)
    sizes = {name: _size(name, difference) for name, difference in body.items()}
    filled = [name for name in body if _count(name, body[name])]
    # Also the empty ones: a parameter that the base does not have is another model's.
    unknown = [name for name in body if shape_of(base, name) is None]
    check_names(base, {name: sizes[name] for name in (*unknown, *filled)})
    deltas = {
        name: _delta(name, base.table[name], body[name], options)
        for name in sorted(filled, key=str.encode)
    }
    entries = sum(_count(name, body[name]) for name in filled)
    summed = entries - sum(delta.nnz for delta in deltas.values())
    facts = {"empty_skipped": len(body) - len(deltas), "duplicates_summed": summed}
    return imported(_NAME, base, "", deltas, record={}, facts=facts, warnings=sum_warnings(summed))


def _differences(found: Mapping[str, Any]) -> dict[str, Any]:
    """By parameter.

    Raises:
        AdapterFileError: there are none; `unsupported_module`, a parameter is there whole.
    """
    for diffs, whole in _LAYOUTS:
        if diffs in found and found.keys() <= {diffs, whole}:
            break
    else:
        wanted = " or ".join(f"{diffs!r} (and {whole!r})" for diffs, whole in _LAYOUTS)
        invalid(f"{_FILE} must hold {wanted}, and nothing else")
    if found.get(whole) not in (None, {}):
        message = f"{_FILE} holds whole parameters ({whole!r}), which this server cannot apply"
        raise AdapterFileError("unsupported_module", message, tensor=whole)
    body = named(found[diffs], repr(diffs))
    if not body:
        invalid(f"{_FILE} holds no differences")
    return body


def _size(name: str, difference: Any) -> tuple[int, ...]:
    """The shape that the file says.

    Raises:
        AdapterFileError: the difference is of neither form.
    """
    if isinstance(difference, PickledSparse):
        return difference.shape
    if not isinstance(difference, Mapping) or difference.keys() != _ENCODED:
        wanted = ", ".join(sorted(_ENCODED))
        invalid(f"the difference is neither a sparse tensor nor a dict of {wanted}", name)
    size = difference["size"]
    if (
        not isinstance(size, tuple)
        or len(size) > _MAX_DIMENSIONS
        or not all(type(side) is int and 0 <= side < _MAX_SIDE for side in size)
    ):
        invalid("size is no shape", name)
    return size


def _count(name: str, difference: Any) -> int:
    if isinstance(difference, PickledSparse):
        return difference.values.array.size
    return floats(difference["values"], name, "values")[0].size


def _delta(name: str, shape: tuple[int, int], difference: Any, options: ImportOptions) -> Delta:
    """Raises: AdapterFileError"""
    values, dtype = _values(name, difference)
    rows, columns = _coordinates(name, shape, difference)
    if rows.shape != values.shape:
        invalid(f"{values.shape} values for {rows.size} positions", name)
    return element_delta(
        name,
        shape,
        row_major(name, shape, rows, columns),
        values,
        dtype,
        duplicates="sum",  # a sparse tensor of PyTorch adds them up
        rounded_to=options.value_dtype,
    )


def _values(name: str, difference: Any) -> tuple[NDArray[Any], ValueDtype]:
    if isinstance(difference, PickledSparse):
        return floats(difference.values, name, "values")
    return floats(difference["values"], name, "values")


def _coordinates(
    name: str, shape: tuple[int, int], difference: Any
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Rows and columns, int64 [nnz]."""
    if isinstance(difference, PickledSparse):
        rows, columns = integers(difference.indices, name, "indices")
        return rows, columns
    steps = integers(difference["index_steps"], name, "index_steps")
    if steps.ndim != 1:
        invalid(f"index_steps has the shape {list(steps.shape)}", name)
    # Each within the weight, so that their sums stay far from the end of int64.
    size = math.prod(shape)
    if steps.size and (int(steps.min()) < 0 or int(steps.max()) >= size):
        at = int(((steps < 0) | (steps >= size)).argmax())
        invalid(f"step {steps[at]} (entry {at}) is not in [0, {size})", name)
    columns, rows = np.divmod(np.cumsum(steps, dtype=np.int64), shape[0])
    return rows, columns


FORMAT = Format(
    _NAME,
    "composable-sft (pickle)",
    "https://github.com/cambridgeltl/composable-sft",
    importer=Importer(_detect, _read),
)
