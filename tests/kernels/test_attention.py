from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor

from gossamer.kernels import (
    Backend,
    IndexRangeError,
    ShapeError,
    kv_page_bytes,
    kv_page_shapes,
    new_kv_pages,
    paged_attention,
    write_kv,
)
from gossamer.kernels.tolerances import agrees, deviation
from tests.kernels.cases import HOST_BACKENDS, generator, same_bits

#: (query heads, kv heads, head dim): SmolLM2's, one head each, Gemma's, odd ones.
HEADS = [(9, 3, 64), (4, 4, 8), (8, 1, 128), (6, 2, 80), (2, 1, 256), (3, 3, 17)]
#: (rows of the step, context) of each sequence.
DECODE = [(1, 5), (1, 100), (1, 64), (1, 65), (1, 1), (1, 200)]
MIXED = [(20, 20), (1, 7), (21, 150), (0, 9), (5, 64)]


@dataclass(frozen=True)
class Step:
    q: Tensor
    keys: list[Tensor]
    values: list[Tensor]
    k_pages: Tensor
    v_pages: Tensor
    page_table: Tensor
    query_start: Tensor
    context_len: Tensor

    def run(
        self, window: int | None = None, softcap: float | None = None, backend: Backend = "cpu"
    ) -> Tensor:
        return paged_attention(
            self.q, self.k_pages, self.v_pages, self.page_table, self.query_start,
            self.context_len, self.q.shape[2] ** -0.5, window, softcap, backend,
        )  # fmt: skip


def int32(values: list[int]) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


def make_step(
    lengths: list[tuple[int, int]], heads: tuple[int, int, int], page: int = 16, seed: int = 0
) -> Step:
    """Scattered pages; everything that no sequence owns is NaN, and so is the table's rest."""
    g = generator(seed)
    q_heads, kv_heads, dim = heads
    need = [-(-context // page) for _, context in lengths]
    k_pages, v_pages = new_kv_pages(sum(need) + 2, page, kv_heads, dim)
    k_pages.fill_(torch.nan)
    v_pages.fill_(torch.nan)
    free = torch.randperm(sum(need) + 2, generator=g).tolist()
    table = torch.full((len(lengths), max(need) + 1), -1, dtype=torch.int32)
    keys, values = [], []
    for i, (_, context) in enumerate(lengths):
        pages = torch.tensor([free.pop() for _ in range(need[i])])
        table[i, : need[i]] = pages
        k = torch.randn(context, kv_heads, dim, generator=g)
        v = torch.randn(context, kv_heads, dim, generator=g)
        position = torch.arange(context)
        slots = pages[position // page] * page + position % page
        write_kv(k, v, k_pages, v_pages, slots)
        keys.append(k)
        values.append(v)
    starts = [0]
    for rows, _ in lengths:
        starts.append(starts[-1] + rows)
    q = torch.randn(starts[-1], q_heads, dim, generator=g)
    return Step(q, keys, values, k_pages, v_pages, table, int32(starts),
                int32([context for _, context in lengths]))  # fmt: skip


def by_hand(step: Step, window: int | None, softcap: float | None) -> Tensor:
    """Attention of every row in float64, from the keys and values as they were written."""
    rows = []
    starts, contexts = step.query_start.tolist(), step.context_len.tolist()
    for i, context in enumerate(contexts):
        count = starts[i + 1] - starts[i]
        for r in range(count):
            at = context - count + r
            low = 0 if window is None else max(0, at - window + 1)
            group = step.q.shape[1] // step.keys[i].shape[1]
            k = step.keys[i][low : at + 1].double().repeat_interleave(group, 1)
            v = step.values[i][low : at + 1].double().repeat_interleave(group, 1)
            scores = torch.einsum("hd,shd->hs", step.q[starts[i] + r].double(), k)
            scores *= step.q.shape[2] ** -0.5
            if softcap is not None:
                scores = softcap * torch.tanh(scores / softcap)
            rows.append(torch.einsum("hs,shd->hd", scores.softmax(-1), v))
    return torch.stack(rows)


@pytest.mark.parametrize("backend", HOST_BACKENDS)
@pytest.mark.parametrize(("window", "softcap"), [(None, None), (10, None), (70, 30.0), (None, 2.0)])
@pytest.mark.parametrize("heads", HEADS, ids=str)
@pytest.mark.parametrize("lengths", [DECODE, MIXED], ids=["decode", "mixed"])
def test_against_float64(
    lengths: list[tuple[int, int]],
    heads: tuple[int, int, int],
    window: int | None,
    softcap: float | None,
    backend: Backend,
) -> None:
    step = make_step(lengths, heads)
    assert agrees(step.run(window, softcap, backend), by_hand(step, window, softcap))


def test_one_wrong_position_is_noticed() -> None:
    step = make_step(MIXED, (9, 3, 64))
    want = by_hand(step, None, None)
    for wrong in (
        replace(step, context_len=step.context_len + int32([0, 0, -1, 0, 0])),
        replace(step, page_table=step.page_table.flip(0).contiguous().clamp(0)),
    ):
        assert not agrees(wrong.run(), want)
    assert not agrees(step.run(window=149), want)  # one position short


def test_large_scores_stay_exact() -> None:
    step = make_step(DECODE, (9, 3, 64))
    step = replace(step, q=step.q * 200)
    assert deviation(step.run(), by_hand(step, None, None)) < 1e-4


@pytest.mark.parametrize("page", [16, 32, 48])
def test_page_sizes(page: int) -> None:
    step = make_step(MIXED, (4, 2, 32), page)
    assert agrees(step.run(40), by_hand(step, 40, None))


def test_a_row_does_not_depend_on_its_neighbours_nor_on_its_chunk() -> None:
    step = make_step([(90, 150), (1, 40), (1, 77)], (9, 3, 64))
    for window in (None, 50):
        whole = step.run(window)
        threads = torch.get_num_threads()
        try:
            for count in (1, 2, 3):
                torch.set_num_threads(count)
                assert same_bits(step.run(window), whole)
        finally:
            torch.set_num_threads(threads)
        for first, last in ((0, 1), (17, 40), (89, 90)):
            part = replace(
                step,
                q=step.q[first:last],
                page_table=step.page_table[:1],
                query_start=int32([0, last - first]),
                context_len=int32([60 + last]),
            )
            assert same_bits(part.run(window), whole[first:last])


def test_nan_of_one_sequence_stays_with_it() -> None:
    step = make_step([(1, 30), (1, 30), (4, 20)], (9, 3, 64))
    want = step.run()
    step.k_pages[int(step.page_table[1, 0])] = torch.nan
    step.q[3] = torch.nan
    got = step.run()
    assert got[1].isnan().all()
    assert got[3].isnan().all()
    for row in (0, 2, 4, 5):
        assert same_bits(got[row], want[row])


def test_pages_before_the_window_are_not_read() -> None:
    step = make_step([(3, 100)], (4, 2, 16))
    want = step.run(window=20)
    step.page_table[0, :4] = -5  # positions 0..63; the oldest visible one is 78
    assert same_bits(step.run(window=20), want)
    assert agrees(step.run(window=20, backend="reference"), by_hand(step, 20, None))


def test_views_into_a_packed_projection_are_served() -> None:
    packed = torch.randn(5, 3 * 4 * 16)
    q, k, v = (t.unflatten(-1, (4, 16)) for t in packed.split(64, dim=-1))
    pages = [new_kv_pages(1, 16, 4, 16) for _ in HOST_BACKENDS]
    for (k_pages, v_pages), backend in zip(pages, HOST_BACKENDS, strict=True):
        k_pages.zero_()
        v_pages.zero_()
        write_kv(k, v, k_pages, v_pages, torch.arange(5), backend)
    assert same_bits(pages[0][0], pages[1][0])
    assert same_bits(pages[0][1], pages[1][1])
    out = paged_attention(q, *pages[0], int32([0])[None], int32([0, 5]), int32([5]), scale=0.25)
    want = torch.nn.functional.scaled_dot_product_attention(
        q.transpose(0, 1), k.transpose(0, 1), v.transpose(0, 1), is_causal=True
    )
    assert agrees(out, want.transpose(0, 1))


def test_write_kv_touches_its_slots_only() -> None:
    for rows in (3, 100):
        k_pages, v_pages = new_kv_pages(10, 16, 2, 8)
        k_pages.fill_(7.0)
        v_pages.fill_(7.0)
        slots = torch.randperm(160, generator=generator(1))[:rows]
        write_kv(torch.zeros(rows, 2, 8), torch.zeros(rows, 2, 8), k_pages, v_pages, slots)
        assert int((k_pages == 0).sum()) == int((v_pages == 0).sum()) == rows * 16
        assert bool((k_pages[slots // 16, :, :, slots % 16] == 0).all())
        assert bool((v_pages[slots // 16, :, slots % 16, :8] == 0).all())


def test_what_points_outside_is_refused() -> None:
    step = make_step([(1, 30), (2, 40)], (4, 2, 16))
    for bad in (
        replace(step, page_table=step.page_table.clamp(0) + 99),
        replace(step, page_table=-1 - step.page_table.clamp(0)),
        replace(step, context_len=int32([30, 64])),
        replace(step, context_len=int32([30, 1 << 30])),
        replace(step, context_len=int32([30, 1])),
        replace(step, query_start=int32([0, 1, 4])),
        replace(step, query_start=int32([2, 1, 3])),
        replace(step, query_start=int32([-3, 1, 3])),
    ):
        with pytest.raises(IndexRangeError):
            bad.run()
    row = torch.zeros(1, 2, 16)
    for slot in (-1, 16 * len(step.k_pages), 2**62):
        with pytest.raises(IndexRangeError):
            write_kv(row, row, step.k_pages, step.v_pages, torch.tensor([slot]))


def test_what_does_not_fit_is_refused() -> None:
    step = make_step([(1, 30)], (4, 2, 16))
    for bad in (
        replace(step, q=step.q[:, :3]),
        replace(step, q=step.q[:, :, :8]),
        replace(step, q=step.q.double()),
        replace(step, q=step.q.transpose(1, 2).contiguous().transpose(1, 2)),
        replace(step, page_table=step.page_table.long()),
        replace(step, page_table=step.page_table[0]),
        replace(step, query_start=int32([0])),
        replace(step, k_pages=step.k_pages[:, :, :, :8]),
        replace(step, v_pages=step.v_pages.transpose(0, 1).contiguous().transpose(0, 1)),
    ):
        with pytest.raises(ShapeError):
            bad.run()
    with pytest.raises(ShapeError):
        kv_page_shapes(1, 8, 1, 1)
    with pytest.raises(ShapeError):
        write_kv(step.q, step.q, step.k_pages, step.v_pages, torch.zeros(1, dtype=torch.int64))


def test_page_bytes() -> None:
    k_pages, v_pages = new_kv_pages(3, 32, 2, 20, torch.bfloat16)
    assert 3 * kv_page_bytes(32, 2, 20, torch.bfloat16) == k_pages.nbytes + v_pages.nbytes
