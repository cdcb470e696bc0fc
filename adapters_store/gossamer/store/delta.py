"""Sparse differences to a base model's weights, as numpy arrays.

Terms: a `Delta` is the sparse difference for one base weight; a `DeltaSet` is everything one adapter
version changes. Both are immutable values; the packed file (`gossamer.store.format`) is one encoding
of a `DeltaSet`, the device layout (`gossamer.kernels.pack`) another.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

Kind = Literal["element", "block"]
ValueDtype = Literal["F32", "F16", "BF16"]

#: numpy's carrier of each value dtype. numpy has no bfloat16: its bits travel as uint16.
CARRIER: dict[ValueDtype, np.dtype[Any]] = {
    "F32": np.dtype("<f4"),
    "F16": np.dtype("<f2"),
    "BF16": np.dtype("<u2"),
}


@dataclass(frozen=True, eq=False)
class Delta:
    """The sparse difference for one base weight of shape (out_features, in_features).

    Attributes:
        kind: `element` (single entries) or `block` (dense tiles).
        shape: (out_features, in_features) of the base weight.
        block_size: B, the side of a tile; 1 for `element`.
        positions: int64 [n], strictly increasing. For `element` the row-major index of the entry,
            row * in_features + column. For `block` the row-major index of the tile in the grid of
            ceil(out / B) × ceil(in / B) tiles; the last row and column of tiles may be ragged.
        values: [n] for `element`, [n, B, B] for `block` (the part of a ragged tile outside the
            weight is zero), in the carrier of `value_dtype` (`CARRIER`).
        value_dtype: how the values are meant: "F32", "F16" or "BF16" (bits in uint16).
        scale: the difference is scale * values.
    """

    kind: Kind
    shape: tuple[int, int]
    block_size: int
    positions: NDArray[np.int64]
    values: NDArray[Any]
    value_dtype: ValueDtype
    scale: float = 1.0

    @property
    def nnz(self) -> int:
        """Number of stored entries of the weight, a tile counted whole (clipped at the edges)."""
        raise NotImplementedError

    def values_f32(self) -> NDArray[np.float32]:
        """The values as float32, scale applied; same shape as `values`."""
        raise NotImplementedError

    def dense(self) -> NDArray[np.float32]:
        """The difference as a dense float32 array of `shape` (for tests and exports)."""
        raise NotImplementedError


@dataclass(frozen=True, eq=False)
class DeltaSet:
    """What one adapter version changes, by base weight name (in the base's own naming)."""

    base_fingerprint: str
    base_name: str
    deltas: Mapping[str, Delta]
    record: Mapping[str, Any] = field(default_factory=dict)
