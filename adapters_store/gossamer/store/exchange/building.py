"""From unsorted foreign positions and values to a checked delta."""

from __future__ import annotations

import math
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
    del outside
    order: NDArray[np.intp] | None = None  # of the file's entries in the result
    if not (positions[1:] > positions[:-1]).all():
        order = np.argsort(positions, kind="stable")
        positions, values = positions[order], values[order]
        new = np.concatenate([[True], positions[1:] != positions[:-1]])
        if not new.all():
            if duplicates == "refuse":
                again = int(new.argmin())
                _refuse(name, f"position {positions[again]} is there twice", int(order[again]))
            values, dtype = _sums(values, dtype, new), "F32"
            rounded_to = rounded_to or dtype
            positions = positions[new]  # one after the other: they are what takes the memory
            order = order[new]
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
    positions: NDArray[np.int64] = rows * shape[1]
    positions += columns
    return positions


def check_count(name: str, shape: tuple[int, ...], count: int) -> None:
    """Whether a weight may have so many entries, before they are read.

    Raises:
        AdapterFileError: it has not as many elements, and no library writes more.
    """
    if count > (size := math.prod(shape)):
        _refuse(name, f"{count} entries, and the weight has {size} elements")


def _sums(values: NDArray[Any], dtype: ValueDtype, new: NDArray[np.bool_]) -> NDArray[np.float32]:
    """float32 sums of the runs that begin where `new` is set."""
    wide = values if dtype == "F32" else from_carrier(values, dtype)
    with np.errstate(
        invalid="ignore", over="ignore"
    ):  # what is not finite is refused with the rest
        sums: NDArray[np.float32] = np.add.reduceat(wide, np.flatnonzero(new))
    return sums


def _refuse(
    name: str, why: str, position: int | None = None, cause: Exception | None = None
) -> NoReturn:
    at = "" if position is None else f" (entry {position})"
    raise AdapterFileError(
        "invalid_adapter_file", f"{printable(name)}{at}: {why}", tensor=name, position=position
    ) from cause
