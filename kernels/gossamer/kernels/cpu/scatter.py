"""Fusing on the CPU: row blocks are the work items, so overlapping deltas meet in one thread.

The entries' old values are saved in the order in which they are overwritten, delta by delta;
restoring walks backwards, so an entry that several deltas touch ends with its first value.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from gossamer.kernels import layout
from gossamer.kernels.cpu.parallel import Kernel, descriptor, max_threads, subroutine
from gossamer.kernels.cpu.simd import (
    fetch_add,
    load_f32,
    load_i32,
    load_i64,
    load_u16,
    prefetch,
    store_f32,
)
from gossamer.kernels.delta import PackedDelta
from gossamer.kernels.errors import ShapeError
from gossamer.kernels.layout import HEADER_WORDS, LANES, SEGMENT_WORDS

# Descriptor, byte offsets. TABLE: per delta the addresses of its buffer and of its saved values.
(TICKET, WEIGHT, ROW, COLUMN, TABLE, COUNT, FACTORS, FACTOR_ROW, FACTOR_PROJECTION, BLOCK_ROWS,
 BLOCKS, UNDO) = range(0, 12 * 8, 8)  # fmt: skip


@subroutine
def _exchange(address: int, kept: int, value: float, undo: int) -> None:
    """Saves an entry and adds to it, or puts the saved one back."""
    if undo:
        store_f32(address, load_f32(kept))
    else:
        old = load_f32(address)
        store_f32(kept, old)
        store_f32(address, old + value)


@subroutine
def _element(d: int, data: int, segment: int, first: int, kept: int, factor: float) -> None:
    undo, across = load_i64(d + UNDO), load_i64(d + COLUMN)
    run = data + load_i64(segment + 8 * layout.RUNS)
    ids = data + load_i64(segment + 8 * layout.ROWS)
    columns = data + load_i64(segment + 8 * layout.COLUMNS)
    values = data + load_i64(segment + 8 * layout.VALUES)
    trash = load_i64(d + BLOCK_ROWS)
    origin = load_i64(d + WEIGHT) + first * load_i64(d + ROW)
    for _ in range(load_i64(segment + 8 * layout.RUN_COUNT)):
        length = load_i32(run)
        for _ in range(load_i32(run + 4)):
            for k in range(length):
                for at in range(k * LANES, (k + 1) * LANES):
                    row, column = load_u16(ids + 2 * (at - k * LANES)), load_u16(columns + 2 * at)
                    padding = k > 0 and column <= load_u16(columns + 2 * (at - LANES))
                    if row == trash or padding:
                        continue
                    address = origin + row * load_i64(d + ROW) + column * across
                    if k + 1 < length:
                        following = load_u16(columns + 2 * (at + LANES))
                        prefetch(address + (following - column) * across)
                    _exchange(address, kept + 4 * at, load_f32(values + 4 * at) * factor, undo)
            ids += 2 * LANES
            columns += 2 * LANES * length
            values += 4 * LANES * length
            kept += 4 * LANES * length
        run += 8


@subroutine
def _block(d: int, data: int, segment: int, first: int, kept: int, factor: float) -> None:
    undo = load_i64(d + UNDO)
    side, offset = load_i64(segment + 8 * layout.KIND), load_i64(segment + 8 * layout.PIECE_ROW)
    pointers = data + load_i64(segment + 8 * layout.ROWS)
    columns = data + load_i64(segment + 8 * layout.COLUMNS)
    values = data + load_i64(segment + 8 * layout.VALUES)
    # A row of tiles that straddles the border of the row block is shared with its neighbour.
    last = min(first + load_i64(d + BLOCK_ROWS), offset + load_i64(segment + 8 * layout.PIECE_ROWS))
    low = load_i64(segment + 8 * layout.RUNS)
    for i in range(low, low + load_i64(segment + 8 * layout.RUN_COUNT)):
        for tile in range(load_i32(pointers + 4 * i), load_i32(pointers + 4 * i + 4)):
            column = load_i32(columns + 4 * tile) * side
            wide = min(side, load_i64(data + 16) - column)
            for c in range(wide):
                for r in range(side):
                    row = offset + i * side + r
                    if first <= row < last:
                        at = values + 4 * ((tile * side + c) * side + r)
                        address = load_i64(d + WEIGHT) + row * load_i64(d + ROW)
                        address += (column + c) * load_i64(d + COLUMN)
                        _exchange(address, kept, load_f32(at) * factor, undo)
                    kept += 4


@subroutine
def _kept_bytes(data: int, segment: int) -> int:
    """Bytes of saved values that a segment needs."""
    side = load_i64(segment + 8 * layout.KIND)
    if side == 0:
        return 4 * LANES * int(load_i64(segment + 8 * layout.STEPS))
    pointers = data + load_i64(segment + 8 * layout.ROWS)
    low = load_i64(segment + 8 * layout.RUNS)
    high = low + load_i64(segment + 8 * layout.RUN_COUNT)
    return 4 * int(side * side * (load_i32(pointers + 4 * high) - load_i32(pointers + 4 * low)))


@subroutine
def _delta(d: int, data: int, kept: int, factors: int, number: int) -> None:
    """One delta's segments in one row block, backwards when undoing."""
    starts = data + 8 * HEADER_WORDS
    table = starts + 8 * (load_i64(data + 32) + 1)
    low, high = load_i64(starts + 8 * number), load_i64(starts + 8 * number + 8)
    first = number * load_i64(d + BLOCK_ROWS)
    for s in range(low):
        kept += _kept_bytes(data, table + 8 * SEGMENT_WORDS * s)
    for i in range(low, high):
        s = high - 1 - (i - low) if load_i64(d + UNDO) else i
        segment = table + 8 * SEGMENT_WORDS * s
        at = kept
        for before in range(low, s):
            at += _kept_bytes(data, table + 8 * SEGMENT_WORDS * before)
        projection = load_i64(segment + 8 * layout.PROJECTION)
        factor = load_f32(factors + projection * load_i64(d + FACTOR_PROJECTION))
        if factor == 0.0:
            continue
        if load_i64(segment + 8 * layout.KIND):
            _block(d, data, segment, first, at, factor)
        else:
            _element(d, data, segment, first, at, factor)


@Kernel
def _scatter(d: int) -> None:
    """Draws row blocks until there are none."""
    count = load_i64(d + COUNT)
    number = fetch_add(d + TICKET, 1)
    while number < load_i64(d + BLOCKS):
        for i in range(count):
            j = count - 1 - i if load_i64(d + UNDO) else i
            entry = load_i64(d + TABLE) + 16 * j
            factors = load_i64(d + FACTORS) + j * load_i64(d + FACTOR_ROW)
            _delta(d, load_i64(entry), load_i64(entry + 8), factors, number)
        number = fetch_add(d + TICKET, 1)


@Kernel
def _measure(d: int) -> None:
    """Sets the word at WEIGHT to the bytes of saved values that the buffer at TABLE needs."""
    data = load_i64(d + TABLE)
    table = data + 8 * (HEADER_WORDS + load_i64(data + 32) + 1)
    total = 0
    for s in range(load_i64(data + 40)):
        total += _kept_bytes(data, table + 8 * SEGMENT_WORDS * s)
    fetch_add(d + WEIGHT, total)


KERNELS = (_scatter, _measure)


def fuse_into(weight: Tensor, deltas: Sequence[PackedDelta], weights: Tensor) -> tuple[Tensor, ...]:
    """See `gossamer.kernels.scatter.fuse_into`; the weight comes as (out, in).

    Returns:
        A copy of the weights, then one float32 tensor of saved entries for each delta.
    """
    if weight.dtype is not torch.float32 or not weight.is_cpu:
        raise ShapeError("weight", "float32 on the CPU", (weight.dtype, weight.device))
    factors = weights.detach().clone().contiguous()
    kept = [torch.empty(_kept_size(delta) // 4) for delta in deltas]
    originals = (factors, *kept)
    try:
        _launch(weight, deltas, originals, undo=False)
    except BaseException:
        restore(weight, deltas, originals)
        raise
    return originals


def restore(weight: Tensor, deltas: Sequence[PackedDelta], originals: tuple[Tensor, ...]) -> None:
    """See `gossamer.kernels.scatter.restore`."""
    _launch(weight, deltas, originals, undo=True)


def _kept_size(delta: PackedDelta) -> int:
    d = descriptor((0, 0, 0, 0, delta.data.data_ptr()))
    _measure.launch(d, 1)
    return d[WEIGHT // 8]


def _launch(
    weight: Tensor, deltas: Sequence[PackedDelta], originals: tuple[Tensor, ...], undo: bool
) -> None:
    factors, *kept = originals
    per_block = layout.block_rows(weight.shape[0])
    addresses = [(p.data.data_ptr(), k.data_ptr()) for p, k in zip(deltas, kept, strict=True)]
    table = descriptor([address for pair in addresses for address in pair])
    row, projection = factors.stride()
    d = descriptor(
        (0, weight.data_ptr(), 4 * weight.stride(0), 4 * weight.stride(1), table.buffer_info()[0],
         len(deltas), factors.data_ptr(), 4 * row, 4 * projection if factors.shape[1] > 1 else 0,
         per_block, -(-weight.shape[0] // per_block), int(undo))
    )  # fmt: skip
    _scatter.launch(d, max_threads())
