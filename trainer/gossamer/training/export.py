"""From trained values to a `DeltaSet`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gossamer.store.delta import Delta, DeltaSet
from gossamer.store.values import ValueDtype
from gossamer.training.methods import Selection


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


@dataclass(frozen=True)
class TrainedWeight:
    """One weight's shape and its values, float32 [nnz], at the selection's positions."""

    shape: tuple[int, int]
    values: NDArray[np.float32]


def export(
    trained: Mapping[str, TrainedWeight],
    selection: Selection,
    *,
    base_fingerprint: str,
    base_name: str,
    value_dtype: ValueDtype = "BF16",
) -> tuple[DeltaSet, Rounding]:
    """The adapter as element deltas, and what rounding its values lost; its record is empty.

    Raises:
        DeltaError: a value is not finite, or too large to be served in every dtype.
    """
    deltas: dict[str, Delta] = {}
    lost = total = 0.0
    zeroed = 0
    for name, weight in trained.items():
        delta = Delta.element(
            weight.shape, selection.positions[name], weight.values, value_dtype=value_dtype
        )
        rounded = delta.values_f32()
        lost += float(np.square(rounded.astype(np.float64) - weight.values).sum())
        total += float(np.square(weight.values.astype(np.float64)).sum())
        zeroed += int(np.count_nonzero((rounded == 0) & (weight.values != 0)))
        deltas[name] = delta
    error = (lost / total) ** 0.5 if total else 0.0
    delta_set = DeltaSet(base_fingerprint, base_name, deltas)
    return delta_set, Rounding(value_dtype, error, zeroed)


def record_fields(rounding: Rounding) -> dict[str, Any]:
    """The rounding as JSON values, for the training record."""
    return {
        "value_dtype": rounding.value_dtype,
        "rounding_error": rounding.relative_error,
        "rounded_to_zero": rounding.zeroed,
    }
