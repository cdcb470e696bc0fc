"""How kernels read a packed delta: its record, its rows and its units (`layout`)."""

from __future__ import annotations

import triton
import triton.language as tl

from gossamer.kernels.gpu import layout

LANES = tl.constexpr(layout.LANES)
TILE_ROWS = tl.constexpr(layout.TILE_ROWS)
FORM = tl.constexpr(layout.FORM)
STARTS = tl.constexpr(layout.STARTS)
LENGTHS = tl.constexpr(layout.LENGTHS)
HIGH = tl.constexpr(layout.HIGH)
UNITS = tl.constexpr(layout.UNITS)
SCALES = tl.constexpr(layout.SCALES)
VALUES8 = tl.constexpr(layout.VALUES8)
BLOCKS = tl.constexpr(layout.BLOCKS)
BOUNDARIES = tl.constexpr(layout.BOUNDARIES)
ROW_BITS = tl.constexpr(layout.ROW_BITS)
ROW_MASK = tl.constexpr(layout.MAX_ROWS - 1)
PAIR = tl.constexpr(layout.PAIR)
WORD = tl.constexpr(layout.WORD)
GROUP = tl.constexpr(layout.GROUP)
SPLIT8 = tl.constexpr(layout.SPLIT8)


@triton.jit
def part_of(record, word: tl.constexpr, kind: tl.constexpr):
    """A part of a packed delta, as a pointer."""
    address = tl.load(record + word)
    return tl.multiple_of(address.to(tl.pointer_type(kind)), 16)


@triton.jit
def value_of(bits, HALF: tl.constexpr):
    """The low 16 bits of each integer, a float16 or a bfloat16, as float32."""
    if HALF:
        value = (bits & 0xFFFF).to(tl.uint16).to(tl.float16, bitcast=True).to(tl.float32)
    else:
        value = ((bits & 0xFFFF).to(tl.int32) << 16).to(tl.float32, bitcast=True)
    return value


@triton.jit
def row_units(record, rows, ROWS: tl.constexpr):
    """First unit and number of units of each row."""
    length = tl.load(part_of(record, LENGTHS, tl.uint8) + rows).to(tl.int32)
    high = tl.load(record + HIGH)
    if high != 0:
        length += tl.load(high.to(tl.pointer_type(tl.uint8)) + rows).to(tl.int32) << 8
    in_tile = tl.reshape(length, [ROWS // TILE_ROWS, TILE_ROWS])
    before = tl.reshape(tl.cumsum(in_tile, axis=1) - in_tile, [ROWS])
    return tl.load(part_of(record, STARTS, tl.int32) + rows // TILE_ROWS) + before, length


@triton.jit
def spread(rows_values, ROWS: tl.constexpr):
    """[ROWS] → [ROWS * LANES], each value for all lanes of its row."""
    wide = tl.broadcast_to(rows_values[:, None], [ROWS, LANES])
    return tl.reshape(wide, [ROWS * LANES])


@triton.jit
def load_group(units, here, live):
    """The two halves of each 128-bit unit."""
    halves = units + 2 * here[:, None] + tl.arange(0, 2)[None, :]
    return tl.split(tl.load(halves, mask=live[:, None], other=0))


@triton.jit
def group_gap(low, SLOT: tl.constexpr):
    """How far the entry of a slot lies behind the one before it; 0: the slot is empty."""
    return ((low >> (8 + 8 * SLOT)) & 0xFF).to(tl.int32)


@triton.jit
def group_value(low, high, SLOT: tl.constexpr, EIGHT: tl.constexpr, HALF: tl.constexpr):
    """The value of a slot of GROUP8 (before its scale) or GROUP."""
    if EIGHT:
        value = ((high >> (8 * SLOT)) & 0xFF).to(tl.int8, bitcast=False).to(tl.float32)
    elif SLOT == 0:
        value = value_of(low >> 48, HALF)
    else:
        value = value_of(high >> (16 * (SLOT - 1)), HALF)
    return value


@triton.jit
def projection_of(boundaries, rows, PROJECTIONS: tl.constexpr):
    """The projection that each output row belongs to; see `layout.boundaries`."""
    projection = tl.zeros_like(rows)
    for p in tl.static_range(PROJECTIONS - 1):
        begin = (boundaries >> (ROW_BITS * p)) & ROW_MASK
        projection += (rows >= begin).to(tl.int32)
    return projection


@triton.jit
def member_weights(weights, weight_row, row, live, boundaries, rows, PROJECTIONS: tl.constexpr):
    """The weights of one member, [1 or output rows, T]; 0, which masks, where no row is."""
    if PROJECTIONS == 1:
        found = tl.load(weights + row * weight_row, mask=live, other=0.0)[None, :]
    else:
        projection = projection_of(boundaries, rows, PROJECTIONS)
        at = weights + row[None, :] * weight_row + projection[:, None]
        found = tl.load(at, mask=live[None, :], other=0.0)
    return found
