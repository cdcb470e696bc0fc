"""Positions inside a tile of 16 rows × 4096 columns, 16 bits each; no row has anything of its own.

    starts  int32 [tiles + 1]  first entry of each tile, tiles row by row
    places  uint16 [n]         row in tile (4), column in tile (12)
    values  uint16 [n]         bfloat16

Nothing is padded, and a row without entries costs nothing. The price: which row an entry adds to is
data. For T = 1 every entry is multiplied into all 16 sums of its tile, 15 times with 0; for more
rows a matrix product with the one-hot rows does that on tensor cores.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator"
from __future__ import annotations

from typing import Any

import numpy as np
import triton
import triton.language as tl
from numpy.typing import NDArray

from benchmarks.layouts.entries import Entries
from benchmarks.layouts.layout import Layout, Packed, Step, signature
from gossamer.kernels.gpu.variant import Variant

ROWS = 16
COLUMN_BITS = 12
#: Entries that a program takes at once.
STEP = 128


def pack(entries: Entries) -> Packed:
    """Sorts entries by tile; inside a tile by row and column."""
    across = -(-entries.columns >> COLUMN_BITS)
    down = -(-entries.rows // ROWS)
    row, column = entries.row, entries.column
    tile = row // ROWS * across + (column >> COLUMN_BITS)
    order = np.argsort(tile, kind="stable")
    places = (row % ROWS << COLUMN_BITS) | (column & (1 << COLUMN_BITS) - 1)
    counts = np.bincount(tile, minlength=across * down)
    arrays: dict[str, NDArray[Any]] = {
        "starts": np.concatenate(([0], np.cumsum(counts))).astype(np.int32),
        "places": places[order].astype(np.uint16),
        "values": entries.bits[order],
    }
    steps = (-(-counts // STEP)).reshape(down, across).sum(axis=1)
    return Packed(entries.rows, entries.columns, len(row), arrays, len(row), steps)


@triton.jit
def _positions(
    y, x, starts, places, values, rows, columns,
    T: tl.constexpr, ROWS: tl.constexpr, COLUMN_BITS: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    COLUMNS: tl.constexpr = 1 << COLUMN_BITS
    tile = tl.program_id(0)
    lane, r, t = tl.arange(0, STEP), tl.arange(0, ROWS), tl.arange(0, T)
    across = tl.cdiv(columns, COLUMNS)
    acc = tl.zeros([ROWS, STEP if T == 1 else T], tl.float32)
    for panel in range(across):
        begin = tl.load(starts + tile * across + panel)
        end = tl.load(starts + tile * across + panel + 1)
        for at in range(begin, end, STEP):
            live = at + lane < end
            place = tl.load(places + at + lane, mask=live, other=0).to(tl.int32)
            bits = tl.load(values + at + lane, mask=live, other=0)
            column = (place & (COLUMNS - 1)) + panel * COLUMNS
            mine = ((place >> COLUMN_BITS)[None, :] == r[:, None]) & live[None, :]
            value = (bits.to(tl.uint32) << 16).to(tl.float32, bitcast=True)
            if T == 1:
                part = tl.load(x + column, mask=live, other=0.0).to(tl.float32)
                hot = tl.where(mine, value[None, :], 0.0)
                acc = tl.fma(hot, tl.broadcast_to(part[None, :], hot.shape), acc)
            else:
                part = tl.load(x + column[:, None] * T + t[None, :], mask=live[:, None], other=0.0)
                hot = tl.where(mine, value[None, :], 0.0).to(part.dtype)
                acc = tl.dot(hot, part, acc, input_precision="ieee")
    row = tile * ROWS + r
    if T == 1:
        tl.store(y + row, tl.sum(acc, axis=1), mask=row < rows)
    else:
        tl.store(y + row[:, None] * T + t[None, :], acc, mask=(row < rows)[:, None])


def variant(width: int) -> Variant:
    """The kernel for so many rows of a step."""
    return Variant(
        f"positions-{width}",
        _positions,
        signature({"starts": "*i32:16", "places": "*u16:16", "values": "*u16:16"}),
        {"T": width, "ROWS": ROWS, "COLUMN_BITS": COLUMN_BITS, "STEP": STEP},
        tensor_cores=width > 1,
    )


def step(width: int) -> Step:
    """16 sums for each entry, or 8 products of 16 × 16 by 16 × 8 for the 128 entries."""
    return Step(STEP, ROWS if width == 1 else 8)


POSITIONS = Layout("tile positions", pack, variant, step)
