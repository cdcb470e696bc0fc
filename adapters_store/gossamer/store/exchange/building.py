"""From unsorted foreign positions and values to a checked delta."""

from __future__ import annotations

from typing import Any, Literal, NoReturn

import numpy as np
from numpy.typing import NDArray

from gossamer.store.delta import Delta, ValueDtype
from gossamer.store.errors import AdapterFileError, DeltaError, printable
from gossamer.store.values import from_carrier

#: What the other library does with a position that is there twice: adds both (`sum`), or something
#: that nobody can rely on (`refuse`).
Duplicates = Literal["sum", "refuse"]


def element_delta(
    name: str,
    shape: tuple[int, int],
    positions: NDArray[np.int64],
    values: NDArray[Any],
    dtype: ValueDtype,
    *,
    duplicates: Duplicates = "refuse",
    rounded_to: ValueDtype | None = None,
) -> Delta:
    """An element delta of one weight.

    Args:
        name: of the weight, for messages.
        shape: (out_features, in_features), the base's.
        positions: int64 [nnz], row-major, in any order.
        values: [nnz] in the carrier of `dtype`.
        duplicates: of positions. Sums are made in float32, in the order of the file.
        rounded_to: the dtype of the result; None: `dtype`.

    Raises:
        AdapterFileError: lengths differ, a position is out of range or there twice, a value is not
            finite or too large.
    """
    if positions.ndim != 1 or values.shape != positions.shape:
        _refuse(name, f"{values.shape} values for positions of shape {positions.shape}")
    size = shape[0] * shape[1]
    outside = (positions < 0) | (positions >= size)
    if outside.any():
        at = int(outside.argmax())
        _refuse(name, f"position {positions[at]} is not in [0, {size})", at)
    order: NDArray[np.intp] | None = None  # of the file's entries in the result
    rising = positions[1:] > positions[:-1]
    if not rising.all():
        order = np.argsort(positions, kind="stable")
        positions, values = positions[order], values[order]
        again = np.flatnonzero(positions[1:] == positions[:-1])
        if again.size and duplicates == "refuse":
            at = int(order[again[0] + 1])
            _refuse(name, f"position {positions[again[0]]} is there twice", at)
        if again.size:
            starts = np.flatnonzero(np.concatenate([[True], positions[1:] != positions[:-1]]))
            with np.errstate(
                invalid="ignore", over="ignore"
            ):  # what is not finite is refused below
                values, dtype = np.add.reduceat(from_carrier(values, dtype), starts), "F32"
            positions, order, rounded_to = positions[starts], order[starts], rounded_to or dtype
    target = rounded_to or dtype
    if target != dtype:
        values = from_carrier(values, dtype)
    try:
        return Delta.element(shape, positions, values, value_dtype=target)
    except DeltaError as error:
        entry = error.position
        if order is not None and entry is not None:
            entry = int(order[entry])
        _refuse(name, error.message, entry, error)


def row_major(
    name: str, shape: tuple[int, int], rows: NDArray[np.int64], columns: NDArray[np.int64]
) -> NDArray[np.int64]:
    """Row-major positions, int64 [nnz], of coordinates in any order.

    Raises:
        AdapterFileError: a coordinate is out of range. Each axis is checked by itself, because a
            column beyond its row would be a position of the next one.
    """
    for what, axis, size in (("row", rows, shape[0]), ("column", columns, shape[1])):
        outside = (axis < 0) | (axis >= size)
        if outside.any():
            at = int(outside.argmax())
            _refuse(name, f"{what} {axis[at]} is not in [0, {size})", at)
    return rows * shape[1] + columns


def _refuse(
    name: str, why: str, position: int | None = None, cause: Exception | None = None
) -> NoReturn:
    at = "" if position is None else f" (entry {position})"
    raise AdapterFileError(
        "invalid_adapter_file", f"{printable(name)}{at}: {why}", tensor=name, position=position
    ) from cause
