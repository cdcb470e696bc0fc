"""Sparse differences to a base model's weights, as numpy arrays.

Terms: a `Delta` is the sparse difference for one base weight; a `DeltaSet` is everything one
adapter version changes. Both are immutable values; the packed file (`gossamer.store.format`) is one
encoding of a `DeltaSet`, the device layout (`gossamer.kernels.pack`) another.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from gossamer.store.delta_rules import (
    BLOCK_SIZES,
    MAX_MAGNITUDE,
    Kind,
    Problem,
    find_problem,
    form_problem,
    nearest_f32,
    outside_of,
    positions_problem,
    run_is_sound,
    values_problem,
)
from gossamer.store.errors import DeltaError
from gossamer.store.values import CARRIER, ValueDtype, from_carrier, to_carrier

__all__ = ["BLOCK_SIZES", "CARRIER", "MAX_MAGNITUDE", "Delta", "DeltaSet", "Kind", "Problem"]
__all__ += ["ValueDtype", "find_problem", "run_is_sound"]


@dataclass(frozen=True, eq=False)
class Delta:
    """The sparse difference for one base weight of shape (out_features, in_features).

    The plain constructor checks nothing; `element`, `block`, `from_coo` and `from_dense` convert,
    check and raise `DeltaError`.

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
        scale: the difference is scale * values. Meant as a float32.
    """

    kind: Kind
    shape: tuple[int, int]
    block_size: int
    positions: NDArray[np.int64]
    values: NDArray[Any]
    value_dtype: ValueDtype
    scale: float = 1.0

    @classmethod
    def element(
        cls,
        shape: tuple[int, int],
        positions: ArrayLike,
        values: ArrayLike,
        *,
        value_dtype: ValueDtype = "F32",
        scale: float = 1.0,
    ) -> Delta:
        """Single entries at strictly increasing row-major positions.

        `values` [n] are floats, rounded once to `value_dtype`, or bfloat16 bits as uint16.
        """
        return _checked(cls, "element", shape, 1, positions, values, value_dtype, scale)

    @classmethod
    def block(
        cls,
        shape: tuple[int, int],
        block_size: int,
        positions: ArrayLike,
        values: ArrayLike,
        *,
        value_dtype: ValueDtype = "F32",
        scale: float = 1.0,
    ) -> Delta:
        """Dense tiles at strictly increasing positions of the tile grid.

        `values` [n, B, B] as in `element`; what lies outside the weight is set to zero.
        """
        return _checked(cls, "block", shape, block_size, positions, values, value_dtype, scale)

    @classmethod
    def from_coo(
        cls,
        shape: tuple[int, int],
        rows: ArrayLike,
        columns: ArrayLike,
        values: ArrayLike,
        *,
        value_dtype: ValueDtype = "F32",
        scale: float = 1.0,
    ) -> Delta:
        """An element delta from coordinates in any order; a coordinate given twice is an error."""
        row, column = np.asarray(rows, np.int64), np.asarray(columns, np.int64)
        for name, axis, size in (("row", row, shape[0]), ("column", column, shape[1])):
            outside = np.flatnonzero((axis < 0) | (axis >= size))
            if outside.size:
                at = int(outside[0])
                raise DeltaError(f"{name} {axis[at]} is not in [0, {size})", position=at)
        flat = row * shape[1] + column
        order = np.argsort(flat, kind="stable")
        return cls.element(
            shape, flat[order], np.asarray(values)[order], value_dtype=value_dtype, scale=scale
        )

    @classmethod
    def from_dense(
        cls,
        difference: ArrayLike,
        *,
        block_size: int | None = None,
        value_dtype: ValueDtype = "F32",
    ) -> Delta:
        """The entries of a dense [out, in] difference that are not zero.

        With `block_size` B, the B × B tiles that hold at least one such entry.
        """
        dense = np.ascontiguousarray(difference, dtype=np.float32)
        if dense.ndim != 2:
            raise DeltaError(f"a weight has two dimensions, this has {dense.ndim}")
        shape = (dense.shape[0], dense.shape[1])
        if block_size is None:
            positions = np.flatnonzero(dense)
            return cls.element(shape, positions, dense.ravel()[positions], value_dtype=value_dtype)
        if block_size not in BLOCK_SIZES:
            raise DeltaError(f"block size {block_size} is not one of {BLOCK_SIZES}")
        rows, columns = _grid(shape, block_size)
        padded = np.zeros((rows * block_size, columns * block_size), np.float32)
        padded[: shape[0], : shape[1]] = dense
        grid = padded.reshape(rows, block_size, columns, block_size).swapaxes(1, 2)
        tiles = grid.reshape(-1, block_size, block_size)
        positions = np.flatnonzero(tiles.any(axis=(1, 2)))
        return cls.block(shape, block_size, positions, tiles[positions], value_dtype=value_dtype)

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of the grid that the positions index: of entries, or of tiles."""
        return _grid(self.shape, self.block_size)

    @property
    def nnz(self) -> int:
        """Number of stored entries of the weight, a tile counted whole (clipped at the edges)."""
        if self.kind == "element":
            return int(self.positions.size)
        rows, columns = self.tile_extents()
        return int((rows * columns).sum())

    def values_f32(self) -> NDArray[np.float32]:
        """The values as float32, scale applied; same shape as `values`; a new array."""
        values = from_carrier(self.values, self.value_dtype)
        if self.scale != 1.0:
            values *= np.float32(self.scale)
        return values

    def elements(self) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        """Every stored entry as (row-major positions int64, ascending; values float32, scaled).

        A block delta is taken apart, its ragged tiles clipped; the entries of its tiles that are
        zero stay, they belong to its support.
        """
        if self.kind == "element":
            return self.positions, self.values_f32()
        size = self.block_size
        tile_row, tile_column = np.divmod(self.positions, self.grid[1])
        rows = (tile_row[:, None] * size + np.arange(size))[:, :, None]
        columns = (tile_column[:, None] * size + np.arange(size))[:, None, :]
        inside = (rows < self.shape[0]) & (columns < self.shape[1])
        positions = (rows * self.shape[1] + columns)[inside]
        order = np.argsort(positions, kind="stable")
        return positions[order], self.values_f32()[inside][order]

    def dense(self) -> NDArray[np.float32]:
        """The difference as a dense float32 array of `shape` (for tests and exports)."""
        if self.kind == "element":
            flat = np.zeros(self.shape[0] * self.shape[1], np.float32)
            flat[self.positions] = self.values_f32()
            return flat.reshape(self.shape)
        (rows, columns), size = self.grid, self.block_size
        tiles = np.zeros((rows * columns, size, size), np.float32)
        tiles[self.positions] = self.values_f32()
        grid = tiles.reshape(rows, columns, size, size).swapaxes(1, 2)
        padded = grid.reshape(rows * size, columns * size)
        return np.ascontiguousarray(padded[: self.shape[0], : self.shape[1]])

    def tile_extents(self) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Rows and columns of each tile that lie inside the weight."""
        tile_row, tile_column = np.divmod(self.positions, self.grid[1])
        size = self.block_size
        rows = np.minimum(size, self.shape[0] - tile_row * size)
        columns = np.minimum(size, self.shape[1] - tile_column * size)
        return rows, columns


@dataclass(frozen=True, eq=False)
class DeltaSet:
    """What one adapter version changes, by base weight name (in the base's own naming).

    Attributes:
        base_fingerprint: `sha256:…` of the base it was made for; empty where nobody knows.
        base_name: the base's name, for people.
        deltas: weight name → delta.
        record: the training record, JSON values only; not part of the digest.
    """

    base_fingerprint: str
    base_name: str
    deltas: Mapping[str, Delta]
    record: Mapping[str, Any] = field(default_factory=dict)

    @property
    def nnz(self) -> int:
        """Number of stored entries over all weights."""
        return sum(delta.nnz for delta in self.deltas.values())


def _grid(shape: tuple[int, int], block_size: int) -> tuple[int, int]:
    return -(-shape[0] // block_size), -(-shape[1] // block_size)


def _checked(
    cls: type[Delta],
    kind: Kind,
    shape: tuple[int, int],
    block_size: int,
    positions: ArrayLike,
    values: ArrayLike,
    value_dtype: ValueDtype,
    scale: float,
) -> Delta:
    where = np.asarray(positions)
    if where.size and where.dtype.kind not in "iu":
        raise DeltaError(f"positions must be integers, not {where.dtype}")
    try:
        carried = to_carrier(np.asarray(values), value_dtype)
    except TypeError as error:
        raise DeltaError(str(error)) from error
    delta = cls(
        kind=kind,
        shape=(int(shape[0]), int(shape[1])),
        block_size=int(block_size),
        positions=np.ascontiguousarray(where, dtype=np.int64),
        values=carried,
        value_dtype=value_dtype,
        scale=nearest_f32(scale),
    )
    problem = form_problem(delta) or positions_problem(delta)
    if problem is None and (outside := outside_of(delta)) is not None:
        at, mask = outside
        clipped = delta.values.copy()
        clipped[at] = np.where(mask, clipped.dtype.type(0), clipped[at])
        delta = replace(delta, values=clipped)
    problem = problem or values_problem(delta, MAX_MAGNITUDE)
    if problem is not None:
        raise DeltaError(problem.message, position=problem.position)
    return delta
