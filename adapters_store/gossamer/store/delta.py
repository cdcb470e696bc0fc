"""Sparse differences to a base model's weights, as numpy arrays.

Terms: a `Delta` is the sparse difference for one base weight; a `DeltaSet` is everything one
adapter version changes. Both are immutable values; the packed file (`gossamer.store.format`) is one
encoding of a `DeltaSet`, the device layout (`gossamer.kernels.pack`) another.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from gossamer.store.errors import DeltaError
from gossamer.store.values import (
    CARRIER,
    ValueDtype,
    bits,
    from_carrier,
    infinity_bits,
    magnitude,
    magnitude_bits,
    to_carrier,
)

__all__ = ["BLOCK_SIZES", "CARRIER", "MAX_MAGNITUDE", "Delta", "DeltaSet", "Kind", "Problem"]
__all__ += ["ValueDtype", "find_problem"]

Kind = Literal["element", "block"]

#: The sides a tile may have.
BLOCK_SIZES = (2, 4, 8, 16, 32, 64, 128)

#: The largest |scale * value| of a delta: the largest float16. Beyond it an adapter could not be
#: served in every dtype, and its products overflow long before float32 does.
MAX_MAGNITUDE = 65504.0


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


class Problem(NamedTuple):
    """What is wrong with a delta, and the index into its positions where it shows."""

    message: str
    position: int | None = None


def find_problem(delta: Delta, max_magnitude: float = MAX_MAGNITUDE) -> Problem | None:
    """The first rule of `Delta` that `delta` breaks, or None; O(nnz), allocates O(nnz).

    The one check of a delta's content: constructors, the writer and the validating reader use it.
    """
    return (
        _form_problem(delta)
        or _positions_problem(delta)
        or _values_problem(delta, max_magnitude)
        or _ragged_problem(delta)
    )


def _form_problem(delta: Delta) -> Problem | None:
    sizes = (1,) if delta.kind == "element" else BLOCK_SIZES
    if delta.block_size not in sizes:
        return Problem(f"block size {delta.block_size} is not one of {sizes} ({delta.kind})")
    if min(delta.shape) < 1:
        return Problem(f"shape {delta.shape} is empty")
    if delta.positions.dtype != np.int64 or delta.positions.ndim != 1:
        return Problem("positions must be int64 with one dimension")
    if delta.values.dtype != CARRIER[delta.value_dtype]:
        return Problem(f"values of dtype {delta.values.dtype} cannot carry {delta.value_dtype}")
    tile = () if delta.kind == "element" else (delta.block_size, delta.block_size)
    expected = (delta.positions.size, *tile)
    if delta.values.shape != expected:
        return Problem(f"values must have shape {expected}, not {delta.values.shape}")
    scale = _f32(delta.scale)
    if not math.isfinite(scale) or scale == 0.0:
        return Problem(f"scale {delta.scale} must be finite and not zero as a float32")
    return None


def _positions_problem(delta: Delta) -> Problem | None:
    positions = delta.positions
    if not positions.size:
        return None
    capacity = delta.grid[0] * delta.grid[1]
    rising = positions[1:] > positions[:-1]
    if rising.all() and positions[0] >= 0 and positions[-1] < capacity:
        return None
    outside = (positions < 0) | (positions >= capacity)
    if outside.any():
        at = int(outside.argmax())
        return Problem(f"position {positions[at]} is not in [0, {capacity})", at)
    at = int((~rising).argmax()) + 1
    pair = f"{positions[at]} after {positions[at - 1]}"
    return Problem(f"positions must be strictly increasing, found {pair}", at)


def _values_problem(delta: Delta, max_magnitude: float) -> Problem | None:
    if not delta.values.size:
        return None
    magnitudes = magnitude_bits(delta.values, delta.value_dtype)
    tile, infinity = delta.block_size**2, infinity_bits(delta.value_dtype)
    largest = int(magnitudes.max())
    if largest >= infinity:
        return Problem("a value is not finite", int((magnitudes >= infinity).argmax()) // tile)
    scale = abs(_f32(delta.scale))
    if magnitude(largest, delta.value_dtype) * scale > max_magnitude:
        at = int(magnitudes.argmax()) // tile
        return Problem(f"a difference is larger than {max_magnitude:g}", at)
    return None


def _ragged_problem(delta: Delta) -> Problem | None:
    """Outside the weight every bit is zero, so that one content has one digest."""
    outside = _outside(delta)
    if outside is None:
        return None
    at, mask = outside
    stray = ((bits(delta.values[at], delta.value_dtype) != 0) & mask).any(axis=(1, 2))
    if not stray.any():
        return None
    return Problem("a ragged tile is not zero outside the weight", int(at[stray.argmax()]))


def _outside(delta: Delta) -> tuple[NDArray[np.intp], NDArray[np.bool_]] | None:
    """Indices of the ragged tiles and, for each, the [B, B] mask of what lies outside."""
    size = delta.block_size
    if delta.shape[0] % size == 0 and delta.shape[1] % size == 0:
        return None
    rows, columns = delta.tile_extents()
    at = np.flatnonzero((rows < size) | (columns < size))
    side = np.arange(size)
    mask = (side[:, None] >= rows[at, None, None]) | (side[None, :] >= columns[at, None, None])
    return at, mask


def _f32(scale: float) -> float:
    """The float32 that a scale is meant as; what overflows is infinite."""
    try:
        nearest: float = struct.unpack("<f", struct.pack("<f", scale))[0]
    except OverflowError:
        return math.copysign(math.inf, scale)
    return nearest


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
        scale=_f32(scale),
    )
    problem = _form_problem(delta) or _positions_problem(delta)
    if problem is None and (outside := _outside(delta)) is not None:
        at, mask = outside
        clipped = delta.values.copy()
        clipped[at] = np.where(mask, clipped.dtype.type(0), clipped[at])
        delta = replace(delta, values=clipped)
    problem = problem or _values_problem(delta, MAX_MAGNITUDE)
    if problem is not None:
        raise DeltaError(problem.message, position=problem.position)
    return delta
