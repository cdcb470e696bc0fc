"""A step without deltas: the base's own products, and paged attention."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch

from benchmarks.kernels.bench import MODEL, Bench, Line
from gossamer.kernels import Backend, linear, new_kv_pages, paged_attention, write_kv

#: Tokens of a KV page.
PAGE = 16


def products(bench: Bench) -> list[Line]:
    """The base's own products and the output head: ours, with the library's as the base."""
    lines = []
    head = torch.randn(MODEL.vocabulary, MODEL.hidden)
    layers = sum(w.nbytes for layer in bench.base for w in layer)
    for rows in (1, 4, 8, 12, 16, 20, 24, 32):
        x = bench.inputs(rows)
        of_head = partial(linear, x[MODEL.hidden], head, False)
        lines += [
            compare(bench, "base products", rows, layers, partial(bench.products, x)),
            compare(bench, "output head", rows, head.nbytes, of_head),
        ]
    return lines


def compare(
    bench: Bench, what: str, rows: int, nbytes: int, step: Callable[[Backend], object]
) -> Line:
    """The line of one product."""
    (ours, library), foreign = bench.alternate(lambda: step("cpu"), lambda: step("reference"))
    return Line(what, "dense", 1.0, rows, 0, nbytes / 1e6,
                bench.predicted(nbytes), ours - library, library,
                library / ours, foreign)  # fmt: skip


def attention(bench: Bench) -> list[Line]:
    """Paged attention of one step: 16 decoding rows, and chunks of a prefill."""
    return [
        attend(bench, what, lengths)
        for what, lengths in (
            ("attention, 16 decoding", [(1, 50 + 7 * i) for i in range(16)]),
            ("attention, 16 decoding at 1 k", [(1, 1000 + 7 * i) for i in range(16)]),
            ("attention, 512 prefill", [(512, 512)]),
        )
    ]


def attend(bench: Bench, what: str, lengths: Sequence[tuple[int, int]]) -> Line:
    """The line of some sequences, each with its new tokens and its whole context."""
    kv_heads, head_size = MODEL.kv_heads, MODEL.head_size
    rows = sum(count for count, _ in lengths)
    pages = [-(-context // PAGE) for _, context in lengths]
    pools = [new_kv_pages(sum(pages), PAGE, kv_heads, head_size) for _ in range(MODEL.layers)]
    for pool in pools:
        for tensor in pool:
            tensor.normal_()
    table = torch.zeros(len(lengths), max(pages), dtype=torch.int32)
    for i, count in enumerate(pages):
        table[i, :count] = sum(pages[:i]) + torch.arange(count)
    counts = torch.tensor([0] + [count for count, _ in lengths])
    starts = counts.cumsum(0).to(torch.int32)
    context_len = torch.tensor([context for _, context in lengths], dtype=torch.int32)
    q, kv = torch.randn(rows, MODEL.heads, head_size), torch.randn(rows, kv_heads, head_size)
    slots = torch.arange(rows)

    def step() -> None:
        for k_pages, v_pages in pools:
            write_kv(kv, kv, k_pages, v_pages, slots)
            paged_attention(q, k_pages, v_pages, table, starts, context_len, head_size**-0.5)

    (milliseconds,), foreign = bench.alternate(step)
    nbytes = MODEL.layers * sum(context for _, context in lengths) * kv_heads * head_size * 8
    return Line(what, "attention", 1.0, rows, 0, nbytes / 1e6,
                bench.predicted(nbytes), milliseconds, 0, 0, foreign)  # fmt: skip
