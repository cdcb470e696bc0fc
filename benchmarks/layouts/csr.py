"""CSR per tile of rows: natural order, four lanes a row; the layout of `gossamer.kernels.gpu`.

    starts   int32 [tiles]   first unit of each 32 rows
    lengths  uint8 [rows]    units of each row, low byte
    high     uint8 [rows]    the high byte; one byte in all if no row has more than 255
    units    uint32 [n]      column (16), bfloat16 (16)
       or    uint64 [2 n]    column, 4 gaps of 8 bits, 5 bfloat16: grouped

Rows are where they are in the weight, so the members of a mix add up in registers. A program takes
8, 32 or 128 rows; all of its rows wait for the longest.
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

TILE_ROWS = 32
LANES = 4
#: Rows to which the arrays with something for each row are padded.
PADDED_ROWS = 128
MAX_GAP = 255
#: Entries of a unit of 16 bytes with 16-bit and with 8-bit values.
GROUP, GROUP8 = 5, 7
#: Types of the kernel's arrays, with one entry a unit.
ARRAYS = {"starts": "*i32:16", "lengths": "*u8:16", "high": "*u8:16", "units": "*u32:16"}


def pack(entries: Entries, program_rows: int) -> Packed:
    """One entry a unit."""
    units = entries.column.astype(np.uint32) | entries.bits.astype(np.uint32) << 16
    return _packed(entries, entries.lengths, units, len(units), program_rows)


def pack_groups(entries: Entries) -> Packed:
    """Up to 5 entries a unit of 16 bytes."""
    group, slot, lengths = _groups(entries, GROUP)
    units = np.zeros((int(lengths.sum()), 16), np.uint8)
    head = slot == 0
    units[:, :2] = entries.column[head].astype(np.uint16)[:, None].view(np.uint8)
    inner = np.flatnonzero(~head)
    units[group[inner], 1 + slot[inner]] = entries.column[inner] - entries.column[inner - 1]
    units.view(np.uint16)[group, 3 + slot] = entries.bits
    slots = GROUP * len(units)
    return _packed(entries, lengths, units.reshape(-1).view(np.uint64), slots, TILE_ROWS)


def group_bytes8(entries: Entries) -> int:
    """Bytes with 8-bit values, of which 7 go into a unit, and a 16-bit scale for each row."""
    lengths = _groups(entries, GROUP8)[2]
    metadata = _packed(entries, lengths, np.zeros(0, np.uint64), 0, TILE_ROWS).nbytes
    return metadata + 16 * int(lengths.sum()) + 2 * entries.rows


def _packed(
    entries: Entries, lengths: NDArray[np.int64], units: NDArray[Any], slots: int, rows: int
) -> Packed:
    """With the arrays that have something for each row, and programs of so many rows."""
    per_row = np.zeros(-(-entries.rows // PADDED_ROWS) * PADDED_ROWS, np.int64)
    per_row[: entries.rows] = lengths
    ends = np.cumsum(per_row.reshape(-1, TILE_ROWS).sum(axis=1))
    has_high = bool(per_row.max(initial=0) > 0xFF)
    arrays: dict[str, NDArray[Any]] = {
        "starts": np.concatenate(([0], ends[:-1])).astype(np.int32),
        "lengths": (per_row & 0xFF).astype(np.uint8),
        "high": (per_row >> 8 if has_high else np.zeros(1)).astype(np.uint8),
        "units": units,
    }
    steps = -(-per_row.reshape(-1, rows).max(axis=1) // LANES)[: -(-entries.rows // rows)]
    count = len(entries.column)
    return Packed(entries.rows, entries.columns, count, arrays, slots, steps, (int(has_high),))


def _groups(
    entries: Entries, size: int
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
    """Unit and slot of each entry, and units of each row; a gap over 255 closes a unit."""
    count = len(entries.column)
    breaks = np.ones(count + 1, bool)
    breaks[1:-1] = np.diff(entries.column) > MAX_GAP
    breaks[entries.starts] = True
    runs = np.flatnonzero(breaks[:-1])
    slot = (np.arange(count) - np.repeat(runs, np.diff(np.append(runs, count)))) % size
    group = np.cumsum(slot == 0) - 1
    return group, slot, np.bincount(entries.row[slot == 0], minlength=entries.rows)


@triton.jit
def _row_lengths(lengths, high, row, has_high):
    length = tl.load(lengths + row).to(tl.int32)
    if has_high != 0:
        length += tl.load(high + row).to(tl.int32) << 8
    return length


@triton.jit
def row_units(starts, lengths, high, row, has_high, ROWS: tl.constexpr, TILE_ROWS: tl.constexpr):
    """First and last unit of each row of a program."""
    length = _row_lengths(lengths, high, row, has_high)
    if ROWS < TILE_ROWS:
        other = tl.arange(0, TILE_ROWS)[None, :]
        first = (row // TILE_ROWS * TILE_ROWS)[:, None]
        others = _row_lengths(lengths, high, first + other, has_high)
        before = tl.sum(tl.where(other < row[:, None] - first, others, 0), axis=1)
    else:
        in_tile = tl.reshape(length, [ROWS // TILE_ROWS, TILE_ROWS])
        before = tl.reshape(tl.cumsum(in_tile, axis=1) - in_tile, [ROWS])
    begin = tl.load(starts + row // TILE_ROWS) + before
    return begin, begin + length


@triton.jit
def spread(value, ROWS: tl.constexpr, LANES: tl.constexpr):
    """Each row's number for all its lanes."""
    return tl.reshape(tl.broadcast_to(value[:, None], [ROWS, LANES]), [ROWS * LANES])


@triton.jit
def _add(acc, x, column, value, live, T: tl.constexpr):
    at = x + column[:, None] * T + tl.arange(0, T)[None, :]
    part = tl.load(at, mask=live[:, None], other=0.0)
    return tl.fma(tl.broadcast_to(value[:, None], part.shape), part.to(tl.float32), acc)


@triton.jit
def _csr(
    y, x, starts, lengths, high, units, rows, columns, has_high,  # noqa: ARG001 - as all kernels
    T: tl.constexpr, ROWS: tl.constexpr, TILE_ROWS: tl.constexpr, LANES: tl.constexpr,
    GROUPED: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    begin, end = row_units(starts, lengths, high, row, has_high, ROWS, TILE_ROWS)
    steps = tl.cdiv(tl.max(end - begin, axis=0), LANES)
    lane = tl.arange(0, ROWS * LANES) % LANES
    at, stop = spread(begin, ROWS, LANES) + lane, spread(end, ROWS, LANES)
    acc = tl.zeros([ROWS * LANES, T], tl.float32)
    for _ in range(steps):
        live = at < stop
        if GROUPED:
            halves = units + 2 * at[:, None] + tl.arange(0, 2)[None, :]
            low, top = tl.split(tl.load(halves, mask=live[:, None], other=0))
            column = (low & 0xFFFF).to(tl.int32)
            for slot in tl.static_range(5):
                if slot == 0:
                    bits = low >> 48
                else:
                    column += ((low >> (8 + 8 * slot)) & 0xFF).to(tl.int32)
                    bits = top >> (16 * (slot - 1))
                value = (bits.to(tl.uint32) << 16).to(tl.float32, bitcast=True)
                acc = _add(acc, x, column, value, live, T)
        else:
            unit = tl.load(units + at, mask=live, other=0)
            value = (unit & 0xFFFF0000).to(tl.float32, bitcast=True)
            acc = _add(acc, x, (unit & 0xFFFF).to(tl.int32), value, live, T)
        at += LANES
    total = tl.sum(tl.reshape(acc, [ROWS, LANES, T]), axis=1)
    place = y + row[:, None] * T + tl.arange(0, T)[None, :]
    tl.store(place, total, mask=(row < rows)[:, None])


def _variant(width: int, rows: int, grouped: bool) -> Variant:
    arrays = {**ARRAYS, "units": "*u64:16"} if grouped else ARRAYS
    return Variant(
        f"{'groups' if grouped else f'csr_{rows}'}-{width}",
        _csr,
        {**signature(arrays), "has_high": "i32"},
        {"T": width, "ROWS": rows, "TILE_ROWS": TILE_ROWS, "LANES": LANES, "GROUPED": grouped},
        num_warps=_warps(rows),
        needs_load_bits=128 if grouped else 32,
    )


def _warps(rows: int) -> int:
    return min(rows * LANES // 32, 4)


def csr(rows: int) -> Layout:
    """One entry a unit, so many rows a program."""
    each_thread = rows * LANES // (32 * _warps(rows))
    return Layout(
        f"CSR, 4-byte units, {rows} rows",
        lambda entries: pack(entries, rows),
        lambda width: _variant(width, rows, False),
        lambda width: Step(rows * LANES, each_thread * width),
    )


GROUPS = Layout(
    "CSR, 16-byte units, 32 rows",
    pack_groups,
    lambda width: _variant(width, TILE_ROWS, True),
    lambda width: Step(GROUP * TILE_ROWS * LANES, GROUP * width),
    group_bytes8,
)
