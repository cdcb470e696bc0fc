"""What a delta must keep to: one check of its content, and a quick one for many at once."""

from __future__ import annotations

import math
import struct
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from gossamer.store.values import (
    CARRIER,
    bits,
    from_carrier,
    infinity_bits,
    magnitude,
    magnitude_bits,
)

if TYPE_CHECKING:
    from gossamer.store.delta import Delta

Kind = Literal["element", "block"]

#: The sides a tile may have.
BLOCK_SIZES = (2, 4, 8, 16, 32, 64, 128)

#: The largest |scale * value| of a delta: the largest float16. Beyond it an adapter could not be
#: served in every dtype, and its products overflow long before float32 does.
MAX_MAGNITUDE = 65504.0


class Problem(NamedTuple):
    """What is wrong with a delta, and the index into its positions where it shows."""

    message: str
    position: int | None = None


def find_problem(delta: Delta, max_magnitude: float = MAX_MAGNITUDE) -> Problem | None:
    """The first rule of `Delta` that `delta` breaks, or None; O(nnz), allocates O(nnz).

    The one check of a delta's content: constructors, the writer and the validating reader use it.
    """
    return (
        form_problem(delta)
        or positions_problem(delta)
        or values_problem(delta, max_magnitude)
        or _ragged_problem(delta)
    )


def run_is_sound(
    deltas: Sequence[Delta],
    positions: NDArray[np.int64],
    values: NDArray[Any],
    max_magnitude: float = MAX_MAGNITUDE,
) -> bool:
    """Whether no delta of a run has a problem, in few passes: 0.5 ms instead of 5 for 210 weights.

    Args:
        deltas: equal in kind, block size and value dtype.
        positions, values: the arrays that the deltas' own are consecutive parts of.
        max_magnitude: of a difference.

    Returns:
        True: `find_problem` is None for each of them. False says nothing: ask it.
    """
    counts = np.array([delta.positions.size for delta in deltas], np.int64)
    if any(form_problem(d) or any(side % d.block_size for side in d.shape) for d in deltas):
        return False
    filled = np.flatnonzero(counts)
    if counts.sum() != positions.size or not filled.size:
        return False
    ends = np.cumsum(counts)[filled]
    starts = ends - counts[filled]
    rising = positions[1:] > positions[:-1]
    rising[ends[:-1] - 1] = True  # from one weight to the next
    capacities = np.array([delta.grid[0] * delta.grid[1] for delta in deltas], np.int64)[filled]
    if not (rising.all() and positions[starts].min() >= 0):
        return False
    if not (positions[ends - 1] < capacities).all():
        return False
    dtype, tile = deltas[0].value_dtype, deltas[0].block_size ** 2
    largest = np.maximum.reduceat(magnitude_bits(values, dtype).ravel(), starts * tile)
    if largest.max() >= infinity_bits(dtype):
        return False
    scales = np.array([abs(nearest_f32(delta.scale)) for delta in deltas])[filled]
    magnitudes = from_carrier(largest.view(CARRIER[dtype]), dtype).astype(np.float64)
    return bool((magnitudes * scales <= max_magnitude).all())


def form_problem(delta: Delta) -> Problem | None:
    """Kind, shapes, dtypes and scale; nothing of the content is read."""
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
    scale = nearest_f32(delta.scale)
    if not math.isfinite(scale) or scale == 0.0:
        return Problem(f"scale {delta.scale} must be finite and not zero as a float32")
    return None


def positions_problem(delta: Delta) -> Problem | None:
    """Positions in their range, strictly increasing."""
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


def values_problem(delta: Delta, max_magnitude: float) -> Problem | None:
    """Values finite, and no difference too large."""
    if not delta.values.size:
        return None
    magnitudes = magnitude_bits(delta.values, delta.value_dtype)
    tile, infinity = delta.block_size**2, infinity_bits(delta.value_dtype)
    largest = int(magnitudes.max())
    if largest >= infinity:
        return Problem("a value is not finite", int((magnitudes >= infinity).argmax()) // tile)
    scale = abs(nearest_f32(delta.scale))
    if magnitude(largest, delta.value_dtype) * scale > max_magnitude:
        at = int(magnitudes.argmax()) // tile
        return Problem(f"a difference is larger than {max_magnitude:g}", at)
    return None


def _ragged_problem(delta: Delta) -> Problem | None:
    """Outside the weight every bit is zero, so that one content has one digest."""
    outside = outside_of(delta)
    if outside is None:
        return None
    at, mask = outside
    stray = ((bits(delta.values[at], delta.value_dtype) != 0) & mask).any(axis=(1, 2))
    if not stray.any():
        return None
    return Problem("a ragged tile is not zero outside the weight", int(at[stray.argmax()]))


def outside_of(delta: Delta) -> tuple[NDArray[np.intp], NDArray[np.bool_]] | None:
    """Indices of the ragged tiles and, for each, the [B, B] mask of what lies outside."""
    size = delta.block_size
    if delta.shape[0] % size == 0 and delta.shape[1] % size == 0:
        return None
    rows, columns = delta.tile_extents()
    at = np.flatnonzero((rows < size) | (columns < size))
    side = np.arange(size)
    mask = (side[:, None] >= rows[at, None, None]) | (side[None, :] >= columns[at, None, None])
    return at, mask


def nearest_f32(scale: float) -> float:
    """The float32 that a scale is meant as; what overflows is infinite."""
    try:
        nearest: float = struct.unpack("<f", struct.pack("<f", scale))[0]
    except OverflowError:
        return math.copysign(math.inf, scale)
    return nearest
