"""Sparse deltas on the CPU: the loop over chunks, row blocks, members and segments.

One work item is (chunk of rows, share of the row blocks). With enough chunks for the threads a
chunk is one item, so its x is transposed once; with few, the row blocks are shared out too. A
chunk's delta terms for one row block are summed in scratch and added to y at the end.

Chunks of one or two rows gather x from where it lies and keep terms[t, row]; larger chunks work on
transposed copies, xt[column, t] and terms[row, t], so that the rows of the step are the lanes.
"""

from __future__ import annotations

import struct
import threading
from typing import Any

from torch import Tensor

from gossamer.kernels import layout
from gossamer.kernels.apply import check
from gossamer.kernels.cpu import block, element
from gossamer.kernels.cpu.checks import require_fp32
from gossamer.kernels.cpu.parallel import (
    FIELDS,
    SEATS,
    TICKET,
    Kernel,
    descriptor,
    max_threads,
    scratch,
    subroutine,
)
from gossamer.kernels.cpu.simd import (
    fetch_add,
    load_f32,
    load_i64,
    rows_add,
    rows_load,
    store_f32,
    store_i64,
    tile_add,
    tile_load,
    tile_store,
    tile_transpose,
    tile_zero,
)
from gossamer.kernels.delta import BoundDeltas
from gossamer.kernels.layout import HEADER_WORDS, LANES, MARGIN, SEGMENT_WORDS
from gossamer.kernels.plan import CHUNK_ROWS, WorkPlan

#: Items per thread from which on a chunk's row blocks stay in one item.
ITEMS_PER_THREAD = 4
#: Entries times rows below which one thread does all: starting the team costs about 2 µs.
SERIAL_WORK = 4096
VECTOR = 4 * LANES

# Descriptor, byte offsets: what a call sets, and what stays for all calls of a step.
(Y, Y_ROW, X, X_ROW, BOUND, THREADS, SCRATCH, SCRATCH_BYTES, PLAN, WEIGHTS, WEIGHT_ROW,
 WEIGHT_MEMBER, WEIGHT_PROJECTION) = range(FIELDS, FIELDS + 13 * 8, 8)  # fmt: skip
_CALL = struct.Struct("@11q")

# `BoundDeltas.table`, byte offsets.
OUT_FEATURES, IN_FEATURES, BLOCK_ROWS, BLOCKS, ENTRIES, SLOTS = range(0, 6 * 8, 8)

# `WorkPlan.data`, byte offsets.
CHUNK_COUNT, ORDER, SETS, CHUNKS = range(0, 4 * 8, 8)

# Scratch of a thread, byte offsets: addresses of the chunk's rows of x and y, the members' weights
# for one segment, xt, and behind it the terms.
X_ROWS, Y_ROWS, FACTORS, XT = 0, 8 * CHUNK_ROWS, 16 * CHUNK_ROWS, 20 * CHUNK_ROWS


@subroutine
def _row(d: int, chunk: int, t: int) -> int:
    """Row `t` of a chunk."""
    plan = load_i64(d + PLAN)
    row: int = load_i64(plan + 8 * (load_i64(plan + ORDER) + load_i64(chunk) + t))
    return row


@subroutine
def _slot(d: int, chunk: int, member: int) -> int:
    """Where a member of a chunk is; 0: it has no delta on this weight."""
    plan = load_i64(d + PLAN)
    slot = load_i64(plan + 8 * (load_i64(plan + SETS) + load_i64(chunk + 16) + member))
    data: int = load_i64(load_i64(d + BOUND) + SLOTS + 8 * slot)
    return data


@subroutine
def _find_rows(d: int, w: int, chunk: int, width: int) -> None:
    """Notes where the chunk's rows are; lanes without a row point to the first."""
    count = load_i64(chunk + 8)
    for t in range(width):
        row = _row(d, chunk, t if t < count else 0)
        store_i64(w + X_ROWS + 8 * t, load_i64(d + X) + row * load_i64(d + X_ROW))
        store_i64(w + Y_ROWS + 8 * t, load_i64(d + Y) + row * load_i64(d + Y_ROW))


@subroutine
def _find_weights(d: int, w: int, chunk: int, member: int, projection: int, width: int) -> None:
    """Notes the weights of one member and projection; lanes without a row get 0, which masks."""
    count = load_i64(chunk + 8)
    base = load_i64(d + WEIGHTS) + member * load_i64(d + WEIGHT_MEMBER)
    base += projection * load_i64(d + WEIGHT_PROJECTION)
    for t in range(width):
        weight = 0.0
        if t < count:
            weight = load_f32(base + _row(d, chunk, t) * load_i64(d + WEIGHT_ROW))
        store_f32(w + FACTORS + 4 * t, weight)


@subroutine
def _segments(data: int, number: int) -> tuple[int, int]:
    """Addresses of a row block's first segment and of the one behind its last."""
    starts = data + 8 * HEADER_WORDS
    table = starts + 8 * (load_i64(data + 32) + 1)
    first, last = load_i64(starts + 8 * number), load_i64(starts + 8 * number + 8)
    return table + 8 * SEGMENT_WORDS * first, table + 8 * SEGMENT_WORDS * last


@subroutine
def _touches(d: int, chunk: int, number: int) -> bool:
    """Whether any member of the chunk has a segment in a row block."""
    for j in range(load_i64(chunk + 24)):
        data = _slot(d, chunk, j)
        if data:
            segment, end = _segments(data, number)
            if segment < end:
                return True
    return False


def _make_terms(width: int, element_: Any, block_: Any, transposed: bool) -> Any:
    """Adds up a chunk's delta terms for one row block, member by member."""

    @subroutine
    def terms(d: int, w: int, chunk: int, number: int, target: int, stride: int) -> None:
        first = number * load_i64(load_i64(d + BOUND) + BLOCK_ROWS)
        in_features = load_i64(load_i64(d + BOUND) + IN_FEATURES)
        # Tiles are placed by their row in the weight, slices by their row in the row block.
        origin = target - 4 * first * (width if transposed else 1)
        for j in range(load_i64(chunk + 24)):
            data = _slot(d, chunk, j)
            if data == 0:
                continue
            segment, end = _segments(data, number)
            while segment < end:
                _find_weights(d, w, chunk, j, load_i64(segment + 8 * layout.PROJECTION), width)
                side = load_i64(segment + 8 * layout.KIND)
                x = w + XT if transposed else w + X_ROWS
                if side == 0:
                    element_(data, segment, w + X_ROWS, w + XT, w + FACTORS, target, stride)
                else:
                    block_(data, segment, x, in_features, w + FACTORS, origin, stride)
                segment += 8 * SEGMENT_WORDS

    return terms


def _make_few(width: int) -> Any:
    """A chunk of up to `width` rows, gathered in place."""
    T = width
    terms = _make_terms(T, element.make_few(T), block.make_few(T), False)

    @subroutine
    def run(d: int, w: int, chunk: int, low: int, high: int) -> None:
        _find_rows(d, w, chunk, T)
        per_block = load_i64(load_i64(d + BOUND) + BLOCK_ROWS)
        stride = 4 * (per_block + 2 * MARGIN)
        target = w + XT + 4 * MARGIN
        for number in range(low, high):
            if not _touches(d, chunk, number):
                continue
            first = number * per_block
            rows = min(per_block, load_i64(load_i64(d + BOUND) + OUT_FEATURES) - first)
            for i in range(0, per_block, LANES):
                tile_store(tile_zero(T, LANES), 1, target + 4 * i, stride)
            terms(d, w, chunk, number, target, stride)
            for t in range(load_i64(chunk + 8)):
                y = load_i64(w + Y_ROWS + 8 * t) + 4 * first
                term = target + t * stride
                whole = rows // LANES * LANES
                for i in range(0, whole, LANES):
                    total = tile_add(
                        tile_load(1, 1, LANES, y + 4 * i, 0),
                        tile_load(1, 1, LANES, term + 4 * i, 0),
                    )
                    tile_store(total, 1, y + 4 * i, 0)
                for i in range(whole, rows):
                    store_f32(y + 4 * i, load_f32(y + 4 * i) + load_f32(term + 4 * i))

    return run


def _make_transpose(width: int) -> Any:
    T, ROW = width, 4 * width

    @subroutine
    def transpose(w: int, columns: int) -> None:
        """xt[column, t] = x_t[column]."""
        whole = columns // T * T
        for i in range(0, whole, T):
            tile = tile_transpose(rows_load(T, T, w + X_ROWS, 4 * i))
            tile_store(tile, 1, w + XT + ROW * i, ROW)
        for i in range(whole, columns):
            for t in range(T):
                value = load_f32(load_i64(w + X_ROWS + 8 * t) + 4 * i)
                store_f32(w + XT + ROW * i + 4 * t, value)

    return transpose


def _make_flush(width: int) -> Any:
    T, ROW = width, 4 * width

    @subroutine
    def flush(w: int, terms: int, first: int, rows: int, count: int) -> None:
        """y_t[first + row] += terms[row, t] for the first `count` rows t of the chunk."""
        whole = rows // T * T
        for i in range(0, whole, T):
            tile = tile_transpose(tile_load(T, 1, T, terms + ROW * i, ROW))
            if count == T:
                rows_add(tile, w + Y_ROWS, 4 * (first + i))
                continue
            tile_store(tile, 1, terms + ROW * i, ROW)
            for t in range(count):
                y = load_i64(w + Y_ROWS + 8 * t) + 4 * (first + i)
                term = tile_load(1, 1, T, terms + ROW * (i + t), 0)
                tile_store(tile_add(tile_load(1, 1, T, y, 0), term), 1, y, 0)
        for i in range(whole, rows):
            for t in range(count):
                y = load_i64(w + Y_ROWS + 8 * t) + 4 * (first + i)
                store_f32(y, load_f32(y) + load_f32(terms + ROW * i + 4 * t))

    return flush


def _make_many(width: int) -> Any:
    """A chunk of up to `width` rows, on transposed copies."""
    T, ROW = width, 4 * width
    transpose, flush = _make_transpose(T), _make_flush(T)
    terms = _make_terms(T, element.make_many(T), block.make_many(T), True)

    @subroutine
    def run(d: int, w: int, chunk: int, low: int, high: int) -> None:
        _find_rows(d, w, chunk, T)
        per_block, columns = (
            load_i64(load_i64(d + BOUND) + BLOCK_ROWS),
            load_i64(load_i64(d + BOUND) + IN_FEATURES),
        )
        target = w + XT + ROW * (columns + MARGIN)
        ready = False
        for number in range(low, high):
            if not _touches(d, chunk, number):
                continue
            if not ready:
                transpose(w, columns)
                ready = True
            first = number * per_block
            for i in range(0, per_block, T):
                tile_store(tile_zero(T, T), 1, target + ROW * i, ROW)
            terms(d, w, chunk, number, target, 0)
            rows = min(per_block, load_i64(load_i64(d + BOUND) + OUT_FEATURES) - first)
            flush(w, target, first, rows, load_i64(chunk + 8))

    return run


_run_1, _run_2 = _make_few(1), _make_few(2)
_run_8, _run_16 = _make_many(8), _make_many(16)


@Kernel
def _apply(d: int) -> None:
    """Draws (chunk, share of the row blocks) items until there are none."""
    plan, bound, threads = load_i64(d + PLAN), load_i64(d + BOUND), load_i64(d + THREADS)
    chunks, blocks = load_i64(plan + CHUNK_COUNT), load_i64(bound + BLOCKS)
    if load_i64(bound + ENTRIES) == 0:
        return
    first_chunk = plan + 8 * load_i64(plan + CHUNKS)
    w = load_i64(d + SCRATCH) + fetch_add(d + SEATS, 1) * load_i64(d + SCRATCH_BYTES)
    parts = blocks if threads > 1 and chunks < ITEMS_PER_THREAD * threads else 1
    items = chunks * parts
    ticket = fetch_add(d + TICKET, 1)
    while ticket < items:
        chunk = first_chunk + 32 * (ticket // parts)
        low = ticket % parts * blocks // parts
        high = (ticket % parts + 1) * blocks // parts
        count = load_i64(chunk + 8)
        if count == 1:
            _run_1(d, w, chunk, low, high)
        elif count == 2:
            _run_2(d, w, chunk, low, high)
        elif count <= 8:
            _run_8(d, w, chunk, low, high)
        else:
            _run_16(d, w, chunk, low, high)
        ticket = fetch_add(d + TICKET, 1)


KERNELS = (_apply,)


class _Step:
    """What all calls of a step share: its plan, its weights, and the descriptor filled with both.

    A step calls `apply` for every weight of the model, just after a product has filled the caches
    with something else; each line of Python then costs several times what it costs in a loop.
    """

    def __init__(self, plan: WorkPlan, weights: Tensor) -> None:
        self.plan = plan
        self.weights = weights
        self.projections = weights.shape[2]
        self.threads = max_threads()
        row, member, projection = weights.stride()
        self.descriptor = descriptor(
            (*[0] * 11, plan.data.data_ptr(), weights.data_ptr(), 4 * row, 4 * member,
             4 * projection if self.projections > 1 else 0)
        )  # fmt: skip


class _Steps(threading.local):
    latest: _Step | None = None


_steps = _Steps()


def apply(y: Tensor, x: Tensor, bound: BoundDeltas, plan: WorkPlan, weights: Tensor) -> None:
    """See `gossamer.kernels.apply.apply`."""
    step = _steps.latest
    if step is None or step.weights is not weights or step.plan is not plan:
        check(y, x, bound, plan, weights)
        step = _steps.latest = _Step(plan, weights)
    out_features, in_features = bound.shape
    if (
        y.shape != (plan.rows, out_features)
        or x.shape != (plan.rows, in_features)
        or plan.slots > len(bound.deltas)
        or step.projections not in (1, bound.projections)
    ):
        check(y, x, bound, plan, weights)
    require_fp32(("y", y), ("x", x))
    per_block = layout.block_rows(out_features)
    threads = 1 if bound.nnz * plan.rows < SERIAL_WORK else step.threads
    scratch_bytes = XT + VECTOR * (in_features + per_block + 2 * MARGIN)
    _CALL.pack_into(
        step.descriptor, 0,
        0, 0, 0, y.data_ptr(), 4 * y.stride(0), x.data_ptr(), 4 * x.stride(0),
        bound.table.data_ptr(), threads, scratch(threads * scratch_bytes), scratch_bytes,
    )  # fmt: skip
    _apply.launch(step.descriptor, threads)
