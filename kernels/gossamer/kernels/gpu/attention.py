"""Paged attention: a program takes some queries of one sequence, for the heads of one kv head.

A long context is cut into spans of fixed length, which are read side by side and put together
afterwards; so that where a span ends depends on the row's own context alone.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from gossamer.kernels.errors import ShapeError
from gossamer.kernels.gpu.kv_cache import rotate_and_write, write_kv
from gossamer.kernels.gpu.launch import launch, require
from gossamer.kernels.gpu.variant import Variant, options

__all__ = ["paged_attention", "rotate_and_write", "write_kv"]

#: Positions of a span; a page table that is no longer makes one span. Short, so that a few rows
#: with long contexts keep a card busy.
SPAN = 512
#: Of what spans leave to be put together; a longer prompt has longer spans.
PARTIAL_BYTES = 256 << 20
#: Rows (queries times heads of a kv head) of a program, and positions it takes at once.
FEW_ROWS, MANY_ROWS = 16, 64
POSITIONS = {2: 64, 4: 32}  # by the width of a value
#: Rows of a program that puts spans together.
_COMBINED = 16
#: Sequences among which a program finds its own; a step of more has the next power of two.
_SEQUENCES = 64


@triton.jit
def _keys(
    page_table, table_row, sequence, at, pages, page_stride, num_pages, kv_head, page_size, d, live,
    DIM: tl.constexpr,
):  # fmt: skip
    """Keys or values of some positions, [positions, d]; 0 where there are none."""
    page = tl.load(page_table + sequence * table_row + at // page_size, mask=live, other=0)
    sound = live & (page >= 0) & (page < num_pages)
    row = page.to(tl.int64) * page_stride + (kv_head * page_size + at % page_size) * DIM
    return tl.load(
        pages + row[:, None] + d[None, :], mask=sound[:, None] & (d < DIM)[None, :], other=0.0
    )


# What differs from step to step must not compile the kernel again.
@triton.jit(
    do_not_specialize=["table_row", "tokens", "num_pages", "sequences", "window", "span_length"]
)
def _attend(
    out, partial, stats, q, q_row, q_head, k_pages, v_pages, page_stride, page_table, table_row,
    query_start, context_len, tokens, num_pages, kv_heads, page_size, sequences, scale, window,
    softcap, span_length,
    GROUP: tl.constexpr, ROWS: tl.constexpr, QUERIES: tl.constexpr, POSITIONS: tl.constexpr,
    DIM: tl.constexpr, WIDTH: tl.constexpr, SEQUENCES: tl.constexpr, MANY_SPANS: tl.constexpr,
    WINDOW: tl.constexpr, SOFTCAP: tl.constexpr,
):  # fmt: skip
    """Semantics: out[t, h] = Σ_s softmax_s(cap(scale · q[t, h] · K_s)) · V_s, s ≤ position of t.

    Programs: (block of queries, kv head, span). With one span the result goes to `out`; with more,
    each span's unscaled sum goes to `partial` [spans, T, heads, dim] and its (largest score, sum of
    weights) to `stats` [spans, T, heads, 2], float32; one behind the context has the score -inf and
    no sum. A sequence's blocks begin at query_start // QUERIES + its number, so each has its own.
    """
    block, kv_head, span = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    i = tl.arange(0, SEQUENCES)
    begins = tl.load(query_start + i, mask=i < sequences, other=1 << 30)
    sequence = tl.sum((begins // QUERIES + i <= block).to(tl.int32), axis=0) - 1
    start = tl.load(query_start + sequence)
    end = tl.load(query_start + sequence + 1)
    context = tl.load(context_len + sequence)
    first = (block - (start // QUERIES + sequence)) * QUERIES
    if first < end - start:
        m = tl.arange(0, ROWS)
        query, head = start + first + m // GROUP, kv_head * GROUP + m % GROUP
        live = (m < QUERIES * GROUP) & (query < end)
        position = context - (end - start) + first + m // GROUP
        d = tl.arange(0, WIDTH)
        mine = live[:, None] & (d < DIM)[None, :]
        rows = tl.load(
            q + query[:, None].to(tl.int64) * q_row + head[:, None] * q_head + d[None, :],
            mask=mine, other=0.0,
        )  # fmt: skip
        low, high = span * span_length, tl.minimum(context, (span + 1) * span_length)
        high = tl.minimum(high, context - (end - start) + first + QUERIES)
        if WINDOW:
            oldest = context - (end - start) + first - window + 1
            low = tl.maximum(low, tl.maximum(oldest, 0) // POSITIONS * POSITIONS)
        largest = tl.full([ROWS], float("-inf"), tl.float32)
        total = tl.zeros([ROWS], tl.float32)
        acc = tl.zeros([ROWS, WIDTH], tl.float32)
        for begin in range(low, high, POSITIONS):
            at = begin + tl.arange(0, POSITIONS)
            there = at < high
            k = _keys(page_table, table_row, sequence, at, k_pages, page_stride, num_pages, kv_head,
                      page_size, d, there, DIM)  # fmt: skip
            score = tl.dot(rows, tl.trans(k), input_precision="ieee") * scale
            if SOFTCAP:
                score = softcap * (1 - 2 / (1 + tl.exp(2 * score / softcap)))
            seen = there[None, :] & (at[None, :] <= position[:, None])
            if WINDOW:
                seen = seen & (at[None, :] > position[:, None] - window)
            score = tl.where(seen, score, float("-inf"))
            new = tl.maximum(largest, tl.max(score, axis=1))
            base = tl.where(new == float("-inf"), 0.0, new)
            weight = tl.exp(score - base[:, None])  # 0 for a row that has seen nothing yet
            fade = tl.exp(largest - base)
            v = _keys(page_table, table_row, sequence, at, v_pages, page_stride, num_pages, kv_head,
                      page_size, d, there, DIM)  # fmt: skip
            acc = tl.dot(weight.to(v.dtype), v, acc * fade[:, None], input_precision="ieee")
            total = total * fade + tl.sum(weight, axis=1)
            largest = new
        row = query.to(tl.int64) * (kv_heads * GROUP) + head
        if not MANY_SPANS:
            # Rows of the padding have no weights, and are not stored.
            result = acc / tl.where(total == 0, 1.0, total)[:, None]
            at_out = out + row[:, None] * DIM + d[None, :]
            tl.store(at_out, result.to(out.dtype.element_ty), mask=mine)
        else:
            row += span.to(tl.int64) * tokens * (kv_heads * GROUP)
            some = mine & (largest > float("-inf"))[:, None]
            tl.store(partial + row[:, None] * DIM + d[None, :], acc, mask=some)
            tl.store(stats + 2 * row, largest, mask=live)
            tl.store(stats + 2 * row + 1, total, mask=live)


@triton.jit(do_not_specialize=["rows", "spans"])
def _combine(
    out, partial, stats, rows, spans, DIM: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr
):
    """Semantics: the softmax over all spans, from each span's sum and statistics.

    Source: Milakov and Gimelshein, Online normalizer calculation for softmax (2018).
    """
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS).to(tl.int64)
    mask = row < rows
    d = tl.arange(0, WIDTH)
    mine = mask[:, None] & (d < DIM)[None, :]
    largest = tl.full([ROWS], float("-inf"), tl.float32)
    for span in range(spans):
        here = tl.load(stats + 2 * (row + span * rows), mask=mask, other=float("-inf"))
        largest = tl.maximum(largest, here)
    base = tl.where(largest == float("-inf"), 0.0, largest)
    total = tl.zeros([ROWS], tl.float32)
    acc = tl.zeros([ROWS, WIDTH], tl.float32)
    for span in range(spans):
        at = row + span * rows
        here = tl.load(stats + 2 * at, mask=mask, other=float("-inf"))
        share = tl.exp(here - base)
        total += share * tl.load(stats + 2 * at + 1, mask=mask, other=0.0)
        some = mine & (here > float("-inf"))[:, None]
        part = tl.load(partial + at[:, None] * DIM + d[None, :], mask=some, other=0.0)
        acc += share[:, None] * part
    result = acc / tl.where(total == 0, 1.0, total)[:, None]
    at_out = out + row[:, None] * DIM + d[None, :]
    tl.store(at_out, result.to(out.dtype.element_ty), mask=mine)


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
    require("q", q)
    require("k_pages", k_pages, like=q)
    require("v_pages", v_pages, like=q)
    for name, tensor in (("page_table", page_table), ("query_start", query_start),
                         ("context_len", context_len)):  # fmt: skip
        if tensor.dtype is not torch.int32 or tensor.device != q.device:
            raise ShapeError(name, f"int32 on {q.device}", (tensor.dtype, tensor.device))
    tokens, heads, dim = q.shape
    num_pages, kv_heads, page_size, _ = k_pages.shape
    sequences = len(context_len)
    out = q.new_empty(tokens, heads, dim)
    group = heads // kv_heads
    shape = _shape(group, dim, tokens > sequences, q.itemsize)
    positions = page_table.shape[1] * page_size
    length = SPAN
    while -(-positions // length) * tokens * heads * dim * 4 > PARTIAL_BYTES:
        length *= 2
    spans = max(-(-positions // length), 1)
    partial = stats = out
    if spans > 1:
        partial = q.new_empty(spans, tokens, heads, dim, dtype=torch.float32)
        stats = q.new_empty(spans, tokens, heads, 2, dtype=torch.float32)
    queries = shape["QUERIES"]
    if tokens:
        _attend[(tokens // queries + sequences, kv_heads, spans)](
            out, partial, stats, q, q.stride(0), q.stride(1), k_pages, v_pages, k_pages.stride(0),
            page_table, page_table.stride(0), query_start, context_len, tokens, num_pages, kv_heads,
            page_size, sequences, scale, sliding_window or 0, softcap or 1.0, length, **shape,
            SEQUENCES=max(triton.next_power_of_2(sequences), _SEQUENCES), MANY_SPANS=spans > 1,
            WINDOW=sliding_window is not None, SOFTCAP=softcap is not None,
            **options(num_warps=_warps(tokens > sequences)),
        )  # fmt: skip
        if spans > 1:
            launch(
                _combine, -(-tokens * heads // _COMBINED), out, partial, stats, tokens * heads,
                spans, DIM=dim, WIDTH=shape["WIDTH"], ROWS=_COMBINED,
            )  # fmt: skip
    return out


def _warps(prefill: bool) -> int:
    """With four, a prefill's accumulators do not fit the registers of sm_80."""
    return 8 if prefill else 4


def _shape(group: int, dim: int, prefill: bool, width: int) -> dict[str, int]:
    """Constants of `_attend` that follow from the heads."""
    rows = max(MANY_ROWS if prefill else FEW_ROWS, triton.next_power_of_2(group))
    return {
        "GROUP": group,
        "ROWS": rows,
        "QUERIES": rows // group,
        "POSITIONS": POSITIONS[width],
        "DIM": dim,
        "WIDTH": max(triton.next_power_of_2(dim), 16),
    }


def _variant(dtype: str, prefill: bool, many_spans: bool) -> Variant:
    value = f"*{dtype}:16"
    wide = "*fp32:16" if many_spans else value
    return Variant(
        f"attend-{dtype}-{'prefill' if prefill else 'decode'}{'-spans' * many_spans}",
        _attend,
        {"out": value, "partial": wide, "stats": wide, "q": value, "q_row": "i32:16",
         "q_head": "i32:16", "k_pages": value, "v_pages": value, "page_stride": "i32:16",
         "page_table": "*i32:16", "table_row": "i32", "query_start": "*i32:16",
         "context_len": "*i32:16", "tokens": "i32", "num_pages": "i32", "kv_heads": "i32",
         "page_size": "i32:16", "sequences": "i32", "scale": "fp32", "window": "i32",
         "softcap": "fp32", "span_length": "i32"},
        {**_shape(4, 128, prefill, 4 if dtype == "fp32" else 2), "SEQUENCES": _SEQUENCES,
         "MANY_SPANS": many_spans, "WINDOW": False, "SOFTCAP": False},
        num_warps=_warps(prefill),
        needs_load_bits=128,
        tensor_cores=dtype != "fp32",
    )  # fmt: skip


VARIANTS = (
    _variant("bf16", False, False),
    _variant("bf16", False, True),
    _variant("bf16", True, False),
    _variant("fp16", True, True),
    _variant("fp32", False, False),
    Variant(
        "combine-bf16",
        _combine,
        {
            "out": "*bf16:16",
            "partial": "*fp32:16",
            "stats": "*fp32:16",
            "rows": "i32",
            "spans": "i32",
        },
        {"DIM": 128, "WIDTH": 128, "ROWS": _COMBINED},
        needs_load_bits=128,
    ),
)
