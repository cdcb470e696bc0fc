"""SELL-C-σ: rows sorted by length inside windows, slices of 32, as long as their longest row.

    starts  int32 [slices + 1]   first entry of each slice
    order   uint16 [slices * 32] the row of each lane; 65535 behind the last
    units   uint32 [...]         step by step 32 entries: column (16), bfloat16 (16)

Every access is coalesced. A row that ends early repeats its last column with value 0. What a lane
sums up belongs to a row that the delta's own sorting chose, so several members of a mix cannot be
added up in registers: each writes its term, or reads and adds to what is there.

Kreutzer, Hager, Wellein, Fehske, Bishop: A unified sparse matrix data format for efficient general
sparse matrix-vector multiplication on modern processors with wide SIMD units, 2014.
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

SLICE = 32
#: Steps of a slice that a program takes at once, by lanes of their own.
LANES = 4
NO_ROW = 0xFFFF


def pack(entries: Entries, window: int) -> Packed:
    """Sorts rows within windows of so many."""
    lengths = entries.lengths
    slices = -(-entries.rows // SLICE)
    order = np.full(slices * SLICE, NO_ROW, np.int64)
    within = np.arange(entries.rows) // window
    order[: entries.rows] = np.lexsort((-lengths, within))
    length = np.append(lengths, 0)[np.where(order == NO_ROW, entries.rows, order)]
    longest = length.reshape(slices, SLICE).max(axis=1)
    starts = np.concatenate(([0], np.cumsum(longest * SLICE)))
    rank = np.empty(entries.rows, np.int64)
    rank[order[order != NO_ROW]] = np.arange(entries.rows)
    row = entries.row
    first = (starts[rank // SLICE] + rank % SLICE)[row]
    place = first + (np.arange(len(row)) - entries.starts[row]) * SLICE
    units = np.zeros(int(starts[-1]), np.uint32)
    units[place] = entries.column.astype(np.uint32) | entries.bits.astype(np.uint32) << 16
    arrays: dict[str, NDArray[Any]] = {
        "starts": starts.astype(np.int32),
        "order": order.astype(np.uint16),
        "units": _repeat_last_columns(units, entries, starts, rank),
    }
    steps = -(-longest // LANES)
    return Packed(entries.rows, entries.columns, len(row), arrays, len(units), steps)


def _repeat_last_columns(
    units: NDArray[np.uint32], entries: Entries, starts: NDArray[Any], rank: NDArray[Any]
) -> NDArray[np.uint32]:
    """Fills the steps behind the end of each row."""
    filled = np.flatnonzero(entries.lengths)
    last = entries.column[entries.starts[filled + 1] - 1].astype(np.uint32)
    slices = rank[filled] // SLICE
    missing = (starts[slices + 1] - starts[slices]) // SLICE - entries.lengths[filled]
    row = np.repeat(np.arange(len(filled)), missing)
    step = np.arange(len(row)) - np.repeat(np.cumsum(missing) - missing, missing)
    step += entries.lengths[filled][row]
    units[starts[slices][row] + rank[filled][row] % SLICE + step * SLICE] = last[row]
    return units


@triton.jit
def _sell(
    y, x, starts, order, units, rows, columns,  # noqa: ARG001 - all kernels take the same
    T: tl.constexpr, SLICE: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    piece = tl.program_id(0)
    begin, end = tl.load(starts + piece), tl.load(starts + piece + 1)
    lane, t = tl.arange(0, SLICE * LANES), tl.arange(0, T)
    acc = tl.zeros([SLICE * LANES, T], tl.float32)
    for at in range(begin, end, SLICE * LANES):
        live = at + lane < end
        unit = tl.load(units + at + lane, mask=live, other=0)
        column = (unit & 0xFFFF).to(tl.int32)
        value = (unit & 0xFFFF0000).to(tl.float32, bitcast=True)
        part = tl.load(x + column[:, None] * T + t[None, :], mask=live[:, None], other=0.0)
        acc = tl.fma(tl.broadcast_to(value[:, None], part.shape), part.to(tl.float32), acc)
    total = tl.sum(tl.reshape(acc, [LANES, SLICE, T]), axis=0)
    row = tl.load(order + piece * SLICE + tl.arange(0, SLICE)).to(tl.int32)
    tl.store(y + row[:, None] * T + t[None, :], total, mask=(row < rows)[:, None])


def variant(width: int) -> Variant:
    """The kernel for so many rows of a step."""
    return Variant(
        f"sell-{width}",
        _sell,
        signature({"starts": "*i32:16", "order": "*u16:16", "units": "*u32:16"}),
        {"T": width, "SLICE": SLICE, "LANES": LANES},
        needs_load_bits=32,
    )


def sell(window: int) -> Layout:
    """SELL-32-σ with a window of σ rows."""
    return Layout(
        f"SELL-32-{window}",
        lambda entries: pack(entries, window),
        variant,
        lambda width: Step(SLICE * LANES, width),
    )
