"""The packer, compiled: the same bytes as the reference writes, without the GIL.

The layout is walked twice by one kernel: without a buffer it checks the positions, counts the
entries of every row and adds up sizes; with a buffer it writes.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from gossamer.kernels import layout
from gossamer.kernels.cpu.parallel import Kernel, descriptor, subroutine
from gossamer.kernels.cpu.simd import (
    load_f32,
    load_i32,
    load_i64,
    store_f32,
    store_i32,
    store_i64,
    store_u16,
)
from gossamer.kernels.delta import Piece, as_elements
from gossamer.kernels.layout import ALIGN, HEADER_WORDS, LANES, SEGMENT_WORDS
from gossamer.kernels.reference.packing import check_positions

# Descriptor, byte offsets. DATA is 0 in the measuring walk, which sets FAILED, ENTRIES and SIZE.
(FAILED, ENTRIES, SIZE, DATA, PIECES, PIECE_COUNT, OUT_FEATURES, IN_FEATURES, BLOCK_ROWS,
 HISTOGRAM, SLICE_STARTS) = range(0, 11 * 8, 8)  # fmt: skip

# A piece, byte offsets. COUNT_AT: address of its int32 entries per row. CURSOR: entries already
# written. STORED: offsets of its pointers, columns and values once its tiles are written.
(SIDE, PROJECTION, ROW_OFFSET, ROWS, LENGTH, POSITIONS, VALUES, COUNT_AT, CURSOR, STORED,
 STORED_COLUMNS, STORED_VALUES) = range(0, 12 * 8, 8)  # fmt: skip
PIECE_WORDS = 12


@subroutine
def _count_rows(d: int, p: int) -> bool:
    """Entries of each row of an element piece; False: a position is out of range or order."""
    columns, positions = load_i64(d + IN_FEATURES), load_i64(p + POSITIONS)
    rows, counts = load_i64(p + ROWS), load_i64(p + COUNT_AT)
    limit = rows * columns
    for r in range(rows):
        store_i32(counts + 4 * r, 0)
    row, end, start, before = 0, columns, 0, -1
    length = load_i64(p + LENGTH)
    for i in range(length):
        position = load_i64(positions + 8 * i)
        if position <= before or position >= limit:
            return False
        before = position
        if position >= end:
            store_i32(counts + 4 * row, i - start)
            start = i
            row = row + 1 if position < end + columns else position // columns
            end = (row + 1) * columns
    if length:
        store_i32(counts + 4 * row, length - start)
    return True


@subroutine
def _count_tiles(d: int, p: int) -> int:
    """Entries of a block piece; -1: a position is out of range or order, or a tile is ragged and
    holds values outside the piece."""
    columns, rows, side = load_i64(d + IN_FEATURES), load_i64(p + ROWS), load_i64(p + SIDE)
    across, down = (columns + side - 1) // side, (rows + side - 1) // side
    before, total = -1, 0
    for i in range(load_i64(p + LENGTH)):
        position = load_i64(load_i64(p + POSITIONS) + 8 * i)
        if position <= before or position >= across * down:
            return -1
        before = position
        tall = min(side, rows - position // across * side)
        wide = min(side, columns - position % across * side)
        total += tall * wide
        if tall < side or wide < side:
            tile = load_i64(p + VALUES) + 4 * i * side * side
            for r in range(side):
                for c in range(side):
                    stray = load_f32(tile + 4 * (r * side + c))
                    if (r >= tall or c >= wide) and stray != 0.0:
                        return -1
    return total


@subroutine
def _align(offset: int, to: int) -> int:
    return (offset + to - 1) // to * to


@subroutine
def _write_rows(d: int, p: int, first: int, low: int, high: int, at: int, used: int) -> None:
    """Entries, padding and row numbers of a segment whose slices have been laid out.

    `at`: the segment's words. The histogram holds, by length, the rank of the next such row.
    """
    data, columns = load_i64(d + DATA), load_i64(d + IN_FEATURES)
    ids = data + load_i64(at + 8 * layout.ROWS)
    targets = data + load_i64(at + 8 * layout.COLUMNS)
    target_values = data + load_i64(at + 8 * layout.VALUES)
    histogram, starts = load_i64(d + HISTOGRAM), load_i64(d + SLICE_STARTS)
    positions, values = load_i64(p + POSITIONS), load_i64(p + VALUES)
    cursor = load_i64(p + CURSOR)
    for r in range(low, high):
        count = load_i32(load_i64(p + COUNT_AT) + 4 * r)
        if count == 0:
            continue
        rank = load_i32(histogram + 4 * count)
        store_i32(histogram + 4 * count, rank + 1)
        store_u16(ids + 2 * rank, load_i64(p + ROW_OFFSET) + r - first)
        step = load_i32(starts + 4 * (rank // LANES))
        stop = load_i32(starts + 4 * (rank // LANES + 1))
        lane = rank % LANES
        column = 0
        for _ in range(count):
            column = load_i64(positions + 8 * cursor) - r * columns
            store_u16(targets + 2 * (step * LANES + lane), column)
            store_f32(target_values + 4 * (step * LANES + lane), load_f32(values + 4 * cursor))
            cursor += 1
            step += 1
        while step < stop:  # a lane that ends early repeats its last column
            store_u16(targets + 2 * (step * LANES + lane), column)
            step += 1
    store_i64(p + CURSOR, cursor)
    while used % LANES:  # lanes without a row write to the trash row
        store_u16(ids + 2 * used, load_i64(d + BLOCK_ROWS))
        used += 1


@subroutine
def _lay_runs(d: int, top: int, runs: int) -> tuple[int, int, int]:
    """Sorts a segment's rows, counted by length in the histogram, into slices and runs.

    Leaves the first rank of each length in the histogram, and the first step of each slice in the
    slice starts. `runs`: where to write the runs, or 0.

    Returns:
        (runs, slices, steps).
    """
    histogram, starts = load_i64(d + HISTOGRAM), load_i64(d + SLICE_STARTS)
    ranks, run_count, slices, steps = 0, 0, 0, 0
    for length in range(top, 0, -1):
        rows = load_i32(histogram + 4 * length)
        store_i32(histogram + 4 * length, ranks)
        ranks += rows
        new = (ranks + LANES - 1) // LANES - slices
        if new > 0:
            if runs:
                store_i32(runs + 8 * run_count, length)
                store_i32(runs + 8 * run_count + 4, new)
            run_count += 1
            for _ in range(new):
                store_i32(starts + 4 * slices, steps)
                slices += 1
                steps += length
    store_i32(starts + 4 * slices, steps)
    return run_count, slices, steps


@subroutine
def _element(d: int, p: int, first: int, at: int, size: int) -> int:
    """One segment of an element piece, at offset `size`; the offset behind it."""
    per_block = load_i64(d + BLOCK_ROWS)
    low = max(first - load_i64(p + ROW_OFFSET), 0)
    high = min(first + per_block - load_i64(p + ROW_OFFSET), load_i64(p + ROWS))
    histogram, counts = load_i64(d + HISTOGRAM), load_i64(p + COUNT_AT)
    top, used = 0, 0
    for r in range(low, high):
        top = max(top, load_i32(counts + 4 * r))
    for length in range(top + 1):
        store_i32(histogram + 4 * length, 0)
    for r in range(low, high):
        length = load_i32(counts + 4 * r)
        used += 1 if length else 0
        store_i32(histogram + 4 * length, load_i32(histogram + 4 * length) + 1)
    data = load_i64(d + DATA)
    runs_at = _align(size, 8)
    runs, slices, steps = _lay_runs(d, top, data + runs_at if data else 0)
    rows_at = _align(runs_at + 8 * runs, 8)
    columns_at = _align(rows_at + 2 * LANES * slices, 8)
    values_at = _align(columns_at + 2 * LANES * steps, ALIGN)
    if data:
        store_i64(at + 8 * layout.RUNS, runs_at)
        store_i64(at + 8 * layout.RUN_COUNT, runs)
        store_i64(at + 8 * layout.ROWS, rows_at)
        store_i64(at + 8 * layout.COLUMNS, columns_at)
        store_i64(at + 8 * layout.VALUES, values_at)
        store_i64(at + 8 * layout.STEPS, steps)
        _write_rows(d, p, first, low, high, at, used)
    end: int = values_at + 4 * LANES * steps
    return end


@subroutine
def _write_tiles(d: int, p: int, pointers_at: int, columns_at: int, values_at: int) -> None:
    data, side = load_i64(d + DATA), load_i64(p + SIDE)
    across = (load_i64(d + IN_FEATURES) + side - 1) // side
    down = (load_i64(p + ROWS) + side - 1) // side
    filled = 0
    for i in range(load_i64(p + LENGTH)):
        position = load_i64(load_i64(p + POSITIONS) + 8 * i)
        while filled <= position // across:
            store_i32(data + pointers_at + 4 * filled, i)
            filled += 1
        store_i32(data + columns_at + 4 * i, position % across)
        source = load_i64(p + VALUES) + 4 * i * side * side
        target = data + values_at + 4 * i * side * side
        for c in range(side):
            for r in range(side):
                value = load_f32(source + 4 * (r * side + c))
                store_f32(target + 4 * (c * side + r), value)
    while filled <= down:
        store_i32(data + pointers_at + 4 * filled, load_i64(p + LENGTH))
        filled += 1


@subroutine
def _block(d: int, p: int, first: int, at: int, size: int) -> int:
    """One segment of a block piece; its tiles are written with the first. The offset behind it."""
    side, rows = load_i64(p + SIDE), load_i64(p + ROWS)
    if load_i64(p + STORED) == 0:
        pointers_at = _align(size, 8)
        columns_at = _align(pointers_at + 4 * ((rows + side - 1) // side + 1), 8)
        values_at = _align(columns_at + 4 * load_i64(p + LENGTH), ALIGN)
        size = values_at + 4 * side * side * load_i64(p + LENGTH)
        store_i64(p + STORED, pointers_at)
        store_i64(p + STORED_COLUMNS, columns_at)
        store_i64(p + STORED_VALUES, values_at)
        if load_i64(d + DATA):
            _write_tiles(d, p, pointers_at, columns_at, values_at)
    if load_i64(d + DATA):
        offset = load_i64(p + ROW_OFFSET)
        low = max(first - offset, 0) // side
        end = min(first + load_i64(d + BLOCK_ROWS) - offset, rows)
        store_i64(at + 8 * layout.KIND, side)
        store_i64(at + 8 * layout.RUNS, low)
        store_i64(at + 8 * layout.RUN_COUNT, (end + side - 1) // side - low)
        store_i64(at + 8 * layout.ROWS, load_i64(p + STORED))
        store_i64(at + 8 * layout.COLUMNS, load_i64(p + STORED_COLUMNS))
        store_i64(at + 8 * layout.VALUES, load_i64(p + STORED_VALUES))
        store_i64(at + 8 * layout.STEPS, load_i64(p + LENGTH))
    return size


@subroutine
def _reaches(d: int, p: int, first: int) -> bool:
    """Whether a piece has entries to place and rows in the row block that starts at `first`."""
    start = load_i64(p + ROW_OFFSET)
    end = start + load_i64(p + ROWS)
    reaches: bool = start < first + load_i64(d + BLOCK_ROWS) and first < end
    return reaches and load_i64(p + LENGTH) > 0


@subroutine
def _check(d: int) -> bool:
    """Counts every piece's entries; False and the piece's index in FAILED: one is wrong."""
    total = 0
    for i in range(load_i64(d + PIECE_COUNT)):
        p = load_i64(d + PIECES) + 8 * PIECE_WORDS * i
        count = load_i64(p + LENGTH)
        if load_i64(p + SIDE):
            count = _count_tiles(d, p)
        elif not _count_rows(d, p):
            count = -1
        if count < 0:
            store_i64(d + FAILED, i)
            return False
        total += count
    store_i64(d + ENTRIES, total)
    return True


@Kernel
def _walk(d: int) -> None:
    """Lays all segments out, row block by row block, and writes them if there is a buffer."""
    data, pieces = load_i64(d + DATA), load_i64(d + PIECES)
    if data == 0 and not _check(d):
        return
    per_block, out_features = load_i64(d + BLOCK_ROWS), load_i64(d + OUT_FEATURES)
    blocks = (out_features + per_block - 1) // per_block
    segments = 0
    for block in range(blocks):
        for i in range(load_i64(d + PIECE_COUNT)):
            if _reaches(d, pieces + 8 * PIECE_WORDS * i, block * per_block):
                segments += 1
    table = data + 8 * (HEADER_WORDS + blocks + 1)
    if data:
        store_i64(data, layout.MAGIC)
        store_i64(data + 8, out_features)
        store_i64(data + 16, load_i64(d + IN_FEATURES))
        store_i64(data + 24, per_block)
        store_i64(data + 32, blocks)
        store_i64(data + 40, segments)
    size = _align(8 * (HEADER_WORDS + blocks + 1 + SEGMENT_WORDS * segments), ALIGN)
    segment = 0
    for block in range(blocks):
        for i in range(load_i64(d + PIECE_COUNT)):
            p = pieces + 8 * PIECE_WORDS * i
            if not _reaches(d, p, block * per_block):
                continue
            at = table + 8 * SEGMENT_WORDS * segment
            if load_i64(p + SIDE):
                size = _block(d, p, block * per_block, at, size)
            else:
                size = _element(d, p, block * per_block, at, size)
            if data:
                store_i64(at + 8 * layout.PROJECTION, load_i64(p + PROJECTION))
                store_i64(at + 8 * layout.PIECE_ROW, load_i64(p + ROW_OFFSET))
                store_i64(at + 8 * layout.PIECE_ROWS, load_i64(p + ROWS))
            segment += 1
        if data:
            store_i64(data + 8 * (HEADER_WORDS + block + 1), segment)
    store_i64(d + SIZE, _align(size, ALIGN))


KERNELS = (_walk,)


def pack(pieces: Sequence[Piece], shape: tuple[int, int]) -> tuple[int, Tensor]:
    """See `gossamer.kernels.delta.pack`."""
    placed = []
    for index, piece in enumerate(pieces):
        if piece.kind == "block" and piece.block_size not in layout.TILE_SIDES:
            check_positions(index, piece, shape[1])
            piece = as_elements(piece, shape[1])
        placed.append(piece)
    # Kept until the end: the kernel reads through their addresses.
    sources = [(p.positions.contiguous(), p.values.contiguous()) for p in placed]
    per_block = layout.block_rows(shape[0])
    counts = np.empty(max(1, sum(p.rows for p in placed)), np.int32)
    histogram = np.empty(shape[1] + 2, np.int32)
    slice_starts = np.empty(per_block // LANES + 2, np.int32)
    table = _piece_table(placed, sources, counts.ctypes.data)
    d = descriptor(
        (-1, 0, 0, 0, table.buffer_info()[0], len(placed), *shape, per_block,
         histogram.ctypes.data, slice_starts.ctypes.data)
    )  # fmt: skip
    _walk.launch(d, 1)
    if d[FAILED // 8] >= 0:
        index = d[FAILED // 8]
        check_positions(index, placed[index], shape[1])
    buffer = torch.zeros(d[SIZE // 8], dtype=torch.uint8)
    d[DATA // 8] = buffer.data_ptr()
    for i in range(len(placed)):
        table[i * PIECE_WORDS + STORED // 8] = 0
    _walk.launch(d, 1)
    return d[ENTRIES // 8], buffer


def _piece_table(
    pieces: Sequence[Piece], sources: Sequence[tuple[Tensor, Tensor]], counts: int
) -> array[int]:
    words: list[int] = []
    for piece, (positions, values) in zip(pieces, sources, strict=True):
        side = piece.block_size if piece.kind == "block" else 0
        words += (side, piece.projection, piece.row_offset, piece.rows, len(positions))
        words += (positions.data_ptr(), values.data_ptr(), counts, 0, 0, 0, 0)
        counts += 4 * piece.rows
    return descriptor(words)
