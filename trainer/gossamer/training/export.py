"""From trained values to a `DeltaSet`."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gossamer.store.delta import Delta, DeltaSet
from gossamer.store.values import ValueDtype, from_carrier, to_carrier
from gossamer.training.methods.method import Trained
from gossamer.training.starting import union


@dataclass(frozen=True)
class Rounding:
    """What rounding the values to the adapter's dtype lost.

    Attributes:
        value_dtype: what they were rounded to.
        relative_error: ‖rounded − trained‖ / ‖trained‖ over all values.
        zeroed: values that were not zero and became so.
    """

    value_dtype: ValueDtype
    relative_error: float
    zeroed: int


def export(
    trained: Trained,
    table: Mapping[str, tuple[int, int]],
    *,
    base_fingerprint: str,
    base_name: str,
    value_dtype: ValueDtype = "BF16",
) -> tuple[DeltaSet, Rounding]:
    """The adapter, and what rounding its values lost; its record is empty.

    Entries that were there from the beginning keep their bits: a weight that has some which the
    dtype does not hold is stored in float32.

    Raises:
        DeltaError: a value is not finite, or too large to be served in every dtype.
    """
    deltas: dict[str, Delta] = {}
    lost = total = 0.0
    zeroed = 0
    for name, entries in sorted(union(trained.entries, trained.fixed).items()):
        positions, values = entries.positions.numpy(), entries.values.float().numpy()
        dtype = value_dtype
        if name in trained.fixed and not _holds(dtype, trained.fixed[name].values.numpy()):
            dtype = "F32"
        if trained.block_size > 1:
            delta = _tiles(table[name], positions, values, trained.block_size, dtype)
        else:
            delta = Delta.element(table[name], positions, values, value_dtype=dtype)
        rounded = delta.elements()[1]
        lost += float(np.square(rounded.astype(np.float64) - values).sum())
        total += float(np.square(values.astype(np.float64)).sum())
        zeroed += int(np.count_nonzero((rounded == 0) & (values != 0)))
        deltas[name] = delta
    error = (lost / total) ** 0.5 if total else 0.0
    delta_set = DeltaSet(base_fingerprint, base_name, deltas)
    return delta_set, Rounding(value_dtype, error, zeroed)


def _holds(dtype: ValueDtype, values: NDArray[Any]) -> bool:
    rounded = from_carrier(to_carrier(values.astype(np.float32), dtype), dtype)
    return bool(np.array_equal(rounded, values))


def _tiles(
    shape: tuple[int, int],
    positions: NDArray[np.int64],
    values: NDArray[np.float32],
    side: int,
    value_dtype: ValueDtype,
) -> Delta:
    """Entries that fill tiles, as tiles."""
    across = math.ceil(shape[1] / side)
    rows, columns = positions // shape[1], positions % shape[1]
    tile = rows // side * across + columns // side
    which, place = np.unique(tile, return_inverse=True)
    blocks = np.zeros((len(which), side, side), np.float32)
    blocks[place, rows % side, columns % side] = values
    return Delta.block(shape, side, which, blocks, value_dtype=value_dtype)


def record_fields(rounding: Rounding) -> dict[str, Any]:
    """The rounding as JSON values, for the training record."""
    return {
        "value_dtype": rounding.value_dtype,
        "rounding_error": rounding.relative_error,
        "rounded_to_zero": rounding.zeroed,
    }
