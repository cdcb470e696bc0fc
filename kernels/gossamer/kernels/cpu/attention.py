"""Paged attention on the CPU.

One work item is (sequence, kv head, tile of rows), where a row is a (query row, head of the group)
pair: all query heads of one kv head read its keys and values together, and so do neighbouring query
rows of a prefill. Positions are taken in spans of `SPAN` that start at multiples of `SPAN`, so the
order of every sum depends on the row's own position only.

Scratch of one thread, in bytes from its base `w` (R = rows of the tile, D padded to vectors):
scaled queries [R, D] | scores [R, SPAN] | output accumulators [R, D] | running maximum [R] |
running sum [R] | first visible position [R] | end of visible positions [R], each of the last four
in 8 bytes.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from torch import Tensor

from gossamer.kernels.cpu import kv_cache
from gossamer.kernels.cpu.checks import require_contiguous, require_fp32, require_int32
from gossamer.kernels.cpu.parallel import (
    FAILED,
    FIELDS,
    SEATS,
    TICKET,
    Kernel,
    counted,
    float_bits,
    max_threads,
    scratch,
    subroutine,
)
from gossamer.kernels.cpu.rows import new_rows
from gossamer.kernels.cpu.simd import (
    fetch_add,
    load_f32,
    load_f64,
    load_i32,
    load_i64,
    outer,
    prefetch,
    store_f32,
    store_i64,
    tile_load,
    tile_scale,
    tile_store,
    tile_zero,
)
from gossamer.kernels.cpu.simd_softmax import (
    tile_exp_minus,
    tile_mask,
    tile_max,
    tile_softcap,
    tile_sum,
)
from gossamer.kernels.errors import IndexRangeError

LANES = 16
VECTOR = 4 * LANES
#: Positions whose scores are held at once.
SPAN = 64
SPAN_VECTORS = SPAN // LANES
SCORE_ROW = 4 * SPAN
#: Rows of a tile. 8 is no faster in prefill than 4, which fits the groups of decode better.
ROWS = 4
#: Value vectors that a tile takes at once: with 4 rows, 16 accumulators.
VALUE_VECTORS = 4
#: Stands for -inf as a running maximum: the difference of two of them is 0, not NaN.
LOWEST = -1e30

# Descriptor of `paged_attention`, byte offsets.
(Q, Q_ROW, Q_HEAD, K, V, OUT, TABLE, TABLE_ROW, TABLE_WIDTH, STARTS, CONTEXT,
 SEQUENCES, GROUP, KV_HEADS, HEAD_DIM, PADDED_DIM, PAGE_SIZE, PAGES, TOKENS, WINDOW, SCALE, SOFTCAP,
 SCRATCH, SCRATCH_BYTES) = range(FIELDS, FIELDS + 24 * 8, 8)  # fmt: skip


@subroutine
def _page(d: int, sequence: int, position: int) -> int:
    """The page that holds a position of a sequence; -1 and the failure flag: out of range."""
    column = position // load_i64(d + PAGE_SIZE)
    if column >= load_i64(d + TABLE_WIDTH):
        store_i64(d + FAILED, 1)
        return -1
    page: int = load_i32(load_i64(d + TABLE) + sequence * load_i64(d + TABLE_ROW) + 4 * column)
    if page < 0 or page >= load_i64(d + PAGES):
        store_i64(d + FAILED, 1)
        return -1
    return page


@subroutine
def _keys(d: int, sequence: int, head: int, position: int) -> int:
    """Address of the first key element at a position; 0: its page is out of range."""
    page = _page(d, sequence, position)
    if page < 0:
        return 0
    size = load_i64(d + PAGE_SIZE)
    plane = page * load_i64(d + KV_HEADS) + head
    address: int = load_i64(d + K) + 4 * (plane * load_i64(d + HEAD_DIM) * size + position % size)
    return address


@subroutine
def _copy_scaled(source: int, target: int, length: int, factor: float) -> None:
    whole = length // LANES * LANES
    for i in range(0, whole, LANES):
        values = tile_load(1, 1, LANES, source + 4 * i, 0)
        tile_store(tile_scale(values, factor), 1, target + 4 * i, 0)
    for i in range(whole, length):
        store_f32(target + 4 * i, load_f32(source + 4 * i) * factor)


@subroutine
def _prepare(
    d: int, w: int, rows: int, sequence: int, head: int, first: int, count: int
) -> tuple[int, int]:
    """Copies the scaled queries in and clears the accumulators; the span of visible positions."""
    head_dim, padded = load_i64(d + HEAD_DIM), load_i64(d + PADDED_DIM)
    group, window = load_i64(d + GROUP), load_i64(d + WINDOW)
    start = load_i32(load_i64(d + STARTS) + 4 * sequence)
    end = load_i32(load_i64(d + STARTS) + 4 * (sequence + 1))
    before = load_i32(load_i64(d + CONTEXT) + 4 * sequence) - (end - start)
    output = w + rows * (padded * 4 + SCORE_ROW)
    state = output + rows * padded * 4
    lowest, highest = before + end - start, 0
    for r in range(rows):
        row = first + min(r, count - 1)
        source = load_i64(d + Q) + (start + row // group) * load_i64(d + Q_ROW)
        source += (head * group + row % group) * load_i64(d + Q_HEAD)
        _copy_scaled(source, w + r * padded * 4, head_dim, load_f64(d + SCALE))
        high = before + row // group + 1
        low = max(0, high - window)
        store_f32(state + 8 * r, LOWEST)
        store_f32(state + 8 * (rows + r), 0.0)
        store_i64(state + 8 * (2 * rows + r), low)
        store_i64(state + 8 * (3 * rows + r), high)
        lowest, highest = min(lowest, low), max(highest, high)
    for i in range(rows * padded // LANES):
        tile_store(tile_zero(1, LANES), 1, output + i * VECTOR, 0)
    return lowest, highest


def _make_score(rows: int) -> Any:
    R, pair = rows, 2 * rows

    @subroutine
    def score(
        d: int, w: int, sequence: int, head: int, span: int, low: int, high: int, cold: bool
    ) -> bool:
        """Scores of a span's visible vectors, two at a time; False: a page is out of range."""
        head_dim, padded = load_i64(d + HEAD_DIM), load_i64(d + PADDED_DIM)
        size = load_i64(d + PAGE_SIZE)
        for at in range(span, min(span + SPAN, high), 2 * LANES):
            middle = at + LANES
            if middle + LANES <= low:
                continue
            left = _keys(d, sequence, head, at if low < middle else middle)
            right = _keys(d, sequence, head, middle) if low < middle < high else left
            if left == 0 or right == 0:
                return False
            acc = tile_zero(pair, LANES)
            if not cold:
                for i in range(head_dim):
                    acc = outer(acc, 2, w + 4 * i, 4 * padded, left + 4 * size * i, right - left)
            else:
                # Decode finds keys and values in memory: asked for in step with the sums, the
                # values at these positions (exact where a page is one vector) and the next keys
                # save a third of the time. A prefill's later tiles find them in the cache.
                values = load_i64(d + V) - load_i64(d + K)
                later = _keys(d, sequence, head, min(at + 2 * LANES, high - 1))
                last = _keys(d, sequence, head, min(at + 3 * LANES, high - 1))
                for i in range(head_dim):
                    acc = outer(acc, 2, w + 4 * i, 4 * padded, left + 4 * size * i, right - left)
                    prefetch(left + values + VECTOR * i)
                    prefetch(right + values + VECTOR * i)
                    prefetch(later + 4 * size * i)
                    prefetch(last + 4 * size * i)
            tile_store(acc, 2, w + R * padded * 4 + 4 * (at - span), SCORE_ROW)
        return True

    return score


@subroutine
def _soften(d: int, w: int, rows: int, span: int) -> None:
    """Turns the scores of a span into unnormalised weights under each row's new maximum."""
    padded, softcap = load_i64(d + PADDED_DIM), load_f64(d + SOFTCAP)
    scores = w + rows * padded * 4
    output = scores + rows * SCORE_ROW
    state = output + rows * padded * 4
    for r in range(rows):
        low, high = load_i64(state + 8 * (2 * rows + r)), load_i64(state + 8 * (3 * rows + r))
        values = tile_load(1, SPAN_VECTORS, LANES, scores + r * SCORE_ROW, 0)
        if softcap > 0.0:
            values = tile_softcap(values, softcap)
        values = tile_mask(values, span, low, high, LOWEST)
        old = load_f32(state + 8 * r)
        new = max(old, tile_max(values))
        values = tile_mask(tile_exp_minus(values, new), span, low, high, 0.0)
        tile_store(values, SPAN_VECTORS, scores + r * SCORE_ROW, 0)
        total = load_f32(state + 8 * (rows + r))
        if new != old:
            shrink = math.exp(old - new)
            total *= shrink
            store_f32(state + 8 * r, new)
            _copy_scaled(output + r * padded * 4, output + r * padded * 4, padded, shrink)
        store_f32(state + 8 * (rows + r), total + tile_sum(values))


def _make_gather(rows: int, columns: int) -> Any:
    R, C = rows, columns

    @subroutine
    def gather(
        d: int, w: int, sequence: int, head: int, span: int, low: int, high: int, column: int
    ) -> None:
        """Adds a span's weighted values to the output, C vectors from `column` on."""
        padded, size = load_i64(d + PADDED_DIM), load_i64(d + PAGE_SIZE)
        scores = w + R * padded * 4
        at = scores + R * SCORE_ROW + 4 * column
        acc = tile_load(R, C, LANES, at, 4 * padded)
        position, last = max(span, low), min(span + SPAN, high)
        while position < last:
            plane = _page(d, sequence, position) * load_i64(d + KV_HEADS) + head
            values = load_i64(d + V) + 4 * (padded * size * plane + column)
            stop = min(last, (position // size + 1) * size)
            while position < stop:
                left = scores + 4 * (position - span)
                row = values + 4 * padded * (position % size)
                acc = outer(acc, C, left, SCORE_ROW, row, VECTOR)
                position += 1
        tile_store(acc, C, at, 4 * padded)

    return gather


@subroutine
def _finish(d: int, output: int, rows: int, sequence: int, head: int, first: int, n: int) -> None:
    """Divides by the running sums and writes the first `n` rows of the tile out."""
    head_dim, padded = load_i64(d + HEAD_DIM), load_i64(d + PADDED_DIM)
    group = load_i64(d + GROUP)
    heads = load_i64(d + KV_HEADS) * group
    start = load_i32(load_i64(d + STARTS) + 4 * sequence)
    totals = output + rows * (padded * 4 + 8)
    for r in range(n):
        row = first + r
        target = (start + row // group) * heads + head * group + row % group
        out = load_i64(d + OUT) + 4 * head_dim * target
        factor = np.float32(1.0) / load_f32(totals + 8 * r)
        _copy_scaled(output + r * padded * 4, out, head_dim, factor)


def _make_tile(rows: int, columns: int) -> Any:
    """The attention of a tile of `rows` rows, compiled to take `columns` value vectors at once."""
    R, wide = rows, columns * LANES
    score, gather, gather_rest = _make_score(R), _make_gather(R, columns), _make_gather(R, 1)

    @subroutine
    def attend(d: int, w: int, sequence: int, head: int, first: int, count: int) -> None:
        padded = load_i64(d + PADDED_DIM)
        low, high = _prepare(d, w, R, sequence, head, first, count)
        for span in range(low // SPAN * SPAN, high, SPAN):
            if not score(d, w, sequence, head, span, low, high, first == 0):
                return
            _soften(d, w, R, span)
            column = 0
            while column + wide <= padded:
                gather(d, w, sequence, head, span, low, high, column)
                column += wide
            while column < padded:
                gather_rest(d, w, sequence, head, span, low, high, column)
                column += LANES
        _finish(d, w + R * (padded * 4 + SCORE_ROW), R, sequence, head, first, count)

    return attend


_attend = _make_tile(ROWS, VALUE_VECTORS)


@Kernel
def _attention(d: int) -> None:
    """Draws (sequence, kv head, tile) items until there are none."""
    w = load_i64(d + SCRATCH) + fetch_add(d + SEATS, 1) * load_i64(d + SCRATCH_BYTES)
    group, kv_heads = load_i64(d + GROUP), load_i64(d + KV_HEADS)
    ticket = fetch_add(d + TICKET, 1)
    base = 0
    for sequence in range(load_i64(d + SEQUENCES)):
        start = load_i32(load_i64(d + STARTS) + 4 * sequence)
        end = load_i32(load_i64(d + STARTS) + 4 * (sequence + 1))
        context = load_i32(load_i64(d + CONTEXT) + 4 * sequence)
        if start < 0 or end < start or end > load_i64(d + TOKENS) or context < end - start:
            store_i64(d + FAILED, 1)
            return
        rows = (end - start) * group
        tiles = (rows + ROWS - 1) // ROWS
        while ticket < base + tiles * kv_heads:
            head, tile = (ticket - base) // tiles, (ticket - base) % tiles
            count = min(ROWS, rows - tile * ROWS)
            _attend(d, w, sequence, head, tile * ROWS, count)
            ticket = fetch_add(d + TICKET, 1)
        base += tiles * kv_heads


KERNELS = (_attention, *kv_cache.KERNELS)

write_kv = kv_cache.write_kv
rotate_and_write = kv_cache.rotate_and_write


def paged_attention(
    q: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    page_table: Tensor,
    query_start: Tensor,
    context_len: Tensor,
    scale: float,
    sliding_window: int | None,
    softcap: float | None,
) -> Tensor:
    """See `gossamer.kernels.attention.paged_attention`."""
    require_fp32(("q", q), ("k_pages", k_pages), ("v_pages", v_pages))
    require_contiguous(k_pages=k_pages, v_pages=v_pages)
    require_int32(
        ("page_table", page_table), ("query_start", query_start), ("context_len", context_len)
    )
    tokens, heads, head_dim = q.shape
    pages, kv_heads, _, page_size = k_pages.shape
    padded = v_pages.shape[3]
    out = new_rows(tokens, heads * head_dim).view(tokens, heads, head_dim)
    threads = max_threads()
    scratch_bytes = ROWS * (4 * (2 * padded + SPAN) + 4 * 8)
    scratch_bytes = -(-scratch_bytes // VECTOR) * VECTOR
    d = counted(
        (q.data_ptr(), 4 * q.stride(0), 4 * q.stride(1), k_pages.data_ptr(),
         v_pages.data_ptr(), out.data_ptr(), page_table.data_ptr(), 4 * page_table.stride(0),
         page_table.shape[1], query_start.data_ptr(), context_len.data_ptr(), context_len.shape[0],
         heads // kv_heads, kv_heads, head_dim, padded, page_size, pages, tokens,
         sliding_window or 1 << 40, float_bits(scale), float_bits(softcap or 0.0),
         scratch(threads * scratch_bytes), scratch_bytes)
    )  # fmt: skip
    _attention.launch(d, threads)
    if d[FAILED // 8]:
        raise IndexRangeError("page_table, query_start or context_len", pages)
    return out
