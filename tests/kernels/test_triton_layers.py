"""Norms, activations, KV pages and attention by the Triton kernels, against the reference."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from gossamer.kernels import (
    EXACT_CODINGS,
    ShapeError,
    Terms,
    WorkPlan,
    apply,
    compute_terms,
    framed_kv_pages,
    fused_add_rms_norm,
    kv_page_bytes,
    new_kv_pages,
    paged_attention,
    rms_norm,
    rotate_and_write,
    silu_and_mul,
    write_kv,
)
from gossamer.kernels.gpu import attention
from gossamer.kernels.tolerances import TOLERANCES, agrees
from tests.kernels.cases import bound, element_piece, generator, plan_of, same_bits
from tests.kernels.test_attention import DECODE, MIXED, Step, by_hand, make_step

DTYPES = list(TOLERANCES)
WIDTHS = [1, 63, 576, 1100]


def random_terms(rows: int, width: int, device: str, g: torch.Generator) -> Terms:
    """Every other row has some; the others hold NaN, which must not show."""
    values = torch.randn(rows, width, generator=g)
    touched = torch.arange(rows) % 2
    values[touched == 0] = torch.nan
    return Terms(values.to(device), touched.to(device))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("width", WIDTHS)
def test_interpret_norms(width: int, dtype: torch.dtype, device: str) -> None:
    g = generator(width)
    x, residual = torch.randn(2, 3, width, generator=g).to(device, dtype).unbind()
    weight = torch.randn(width, generator=g).to(device, dtype)
    assert agrees(rms_norm(x, weight, 1e-2, "triton"), rms_norm(x, weight, 1e-2, "reference"))
    assert not agrees(
        rms_norm(x + 1, weight, 1e-2, "triton"), rms_norm(x, weight, 1e-2, "reference")
    )
    for terms in (None, random_terms(3, width, device, g)):
        sums = [residual.clone(), residual.clone()]
        got = fused_add_rms_norm(sums[0], x, weight, 1e-2, "triton", terms)
        want = fused_add_rms_norm(sums[1], x, weight, 1e-2, "reference", terms)
        assert same_bits(*sums)
        assert agrees(got, want)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("width", WIDTHS)
def test_interpret_silu_and_mul(width: int, dtype: torch.dtype, device: str) -> None:
    g = generator(width)
    wide = torch.randn(3, 2 * width + 5, generator=g).to(device, dtype)
    gate_up = wide[:, : 2 * width]
    for terms in (None, random_terms(3, 2 * width, device, g)):
        got = silu_and_mul(gate_up, "triton", terms)
        assert agrees(got, silu_and_mul(gate_up, "reference", terms))
        assert not agrees(got, silu_and_mul(gate_up + 1, "reference", terms))
        plain = silu_and_mul(gate_up, "triton")
        assert terms is None or same_bits(got[::2], plain[::2])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("heads", [(9, 3, 64), (1, 1, 2), (4, 2, 80)], ids=str)
def test_interpret_rotating_and_writing(
    heads: tuple[int, int, int], dtype: torch.dtype, device: str
) -> None:
    g = generator(1)
    rows, (query, kv, dim) = 4, heads
    qkv = torch.randn(rows, (query + 2 * kv) * dim, generator=g).to(device, dtype)
    cos, sin = torch.randn(2, rows, dim, generator=g).to(device, dtype).unbind()
    slots = torch.randperm(48, generator=g)[:rows].to(device)
    for terms in (None, random_terms(rows, qkv.shape[1], device, g)):
        pages = [new_kv_pages(3, 16, kv, dim, dtype, device, "triton") for _ in range(2)]
        for page in (*pages[0], *pages[1]):
            page.fill_(7.0)
        got, want = qkv.clone(), qkv.clone()
        rotate_and_write(got, cos, sin, *pages[0], slots, "triton", terms)
        k_host, v_host = new_kv_pages(3, 16, kv, dim, dtype, device)
        k_host.fill_(7.0)
        v_host.fill_(7.0)
        rotate_and_write(want, cos, sin, k_host, v_host, slots, "reference", terms)
        # v with its terms is wanted in the pages only
        assert agrees(got[:, : -kv * dim], want[:, : -kv * dim])
        assert not agrees(got[:, : -kv * dim].flip(0), want[:, : -kv * dim])
        assert agrees(pages[0][0], k_host.transpose(2, 3).float())
        assert same_bits(pages[0][1], v_host[..., :dim])
        whole = want.view(rows, -1, dim)
        write_kv(whole[:, query:-kv], whole[:, -kv:], *pages[1], slots, "triton")
        assert same_bits(pages[1][0], k_host.transpose(2, 3))
        assert same_bits(pages[1][1], v_host[..., :dim])


def test_interpret_a_slot_outside_is_not_written(device: str) -> None:
    for outside in (-1, 48, 2**62):
        qkv = torch.randn(2, 3 * 16, device=device)
        angles = torch.ones(2, 16, device=device)
        pages = new_kv_pages(3, 16, 1, 16, device=device, backend="triton")
        for page in pages:
            page.fill_(7.0)
        slots = torch.tensor([3, outside], device=device)
        rotate_and_write(qkv, angles, angles, *pages, slots, "triton")
        k = qkv[:, :16].unflatten(1, (1, 16))
        write_kv(k, k, *pages, slots, "triton")
        assert int((pages[0] != 7.0).sum()) == int((pages[1] != 7.0).sum()) == 16


def on_device(step: Step, dtype: torch.dtype, device: str) -> Step:
    """The same step in the pages of the Triton kernels: the second of two layers in a block."""
    dim = step.q.shape[2]
    pages, kv_heads, _, size = step.k_pages.shape
    frame = 2 * kv_page_bytes(size, kv_heads, dim, dtype, "triton")
    block = torch.zeros(pages * frame, dtype=torch.uint8, device=device)
    _, (k_pages, v_pages) = framed_kv_pages(block, 2, size, kv_heads, dim, dtype)
    k_pages.copy_(step.k_pages.transpose(2, 3))
    v_pages.copy_(step.v_pages[..., :dim])
    return replace(
        step,
        q=step.q.to(device, dtype),
        k_pages=k_pages,
        v_pages=v_pages,
        page_table=step.page_table.to(device),
        query_start=step.query_start.to(device),
        context_len=step.context_len.to(device),
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("window", "softcap"), [(None, None), (10, None), (70, 30.0)])
@pytest.mark.parametrize("heads", [(9, 3, 64), (4, 4, 8), (6, 2, 80)], ids=str)
@pytest.mark.parametrize("lengths", [DECODE, MIXED], ids=["decode", "mixed"])
def test_interpret_attention(
    lengths: list[tuple[int, int]],
    heads: tuple[int, int, int],
    window: int | None,
    softcap: float | None,
    dtype: torch.dtype,
    device: str,
) -> None:
    step = make_step(lengths, heads)
    want = by_hand(step, window, softcap)
    got = on_device(step, dtype, device).run(window, softcap, "triton")
    assert agrees(got.cpu(), want)
    assert not agrees(got.cpu(), want.roll(1, 0))


def test_interpret_attention_over_several_spans(
    device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attention, "SPAN", 64)
    for lengths in (DECODE, MIXED):
        step = make_step(lengths, (4, 2, 32))
        placed = on_device(step, torch.float32, device)
        for window in (None, 30):
            assert agrees(placed.run(window, None, "triton").cpu(), by_hand(step, window, None))


def test_interpret_long_prompts_have_longer_spans(
    device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Room for what the spans leave is bounded; what lies behind a context is never read."""
    monkeypatch.setattr(attention, "SPAN", 16)
    step = make_step(MIXED, (4, 2, 32))
    placed = on_device(step, torch.float32, device)
    wide = torch.nn.functional.pad(placed.page_table, (0, 9))
    for room in (1 << 28, 1 << 17):
        monkeypatch.setattr(attention, "PARTIAL_BYTES", room)
        monkeypatch.setattr(torch.Tensor, "new_empty", poisoned_empty)
        got = replace(placed, page_table=wide).run(backend="triton").cpu()
        monkeypatch.undo()
        monkeypatch.setattr(attention, "SPAN", 16)
        assert agrees(got, by_hand(step, None, None))


def poisoned_empty(self: torch.Tensor, *size: Any, **given: Any) -> torch.Tensor:
    """Memory that was used before, and must not be read."""
    room = torch.empty(*size, **{"dtype": self.dtype, "device": self.device, **given})
    return room.fill_(torch.nan) if room.is_floating_point() else room


def test_interpret_empty_sequences_behind(device: str) -> None:
    # As a recorded step has them: more sequences than rows, without context.
    step = make_step([(1, 30), (1, 40)], (4, 2, 32))
    want = by_hand(step, None, None)
    longer = replace(
        on_device(step, torch.float32, device),
        page_table=torch.nn.functional.pad(step.page_table, (0, 5, 0, 6)).to(device),
        query_start=torch.tensor([0, 1, *[2] * 7], dtype=torch.int32, device=device),
        context_len=torch.tensor([30, 40, *[0] * 6], dtype=torch.int32, device=device),
    )
    assert agrees(longer.run(backend="triton").cpu(), want)


def test_interpret_pages_outside_are_not_read(device: str) -> None:
    step = on_device(make_step([(1, 30)], (4, 2, 32)), torch.float32, device)
    for page in (-1, 10**6):
        wrong = replace(step, page_table=torch.full_like(step.page_table, page))
        assert (wrong.run(backend="triton") == 0).all()


def test_interpret_terms_are_what_apply_adds(device: str) -> None:
    g = generator(0)
    for dtype in (torch.float32, torch.bfloat16):
        deltas = bound(
            [[element_piece(40, 50, 0.2, g)] for _ in range(2)], (40, 50), 1, "triton",
            EXACT_CODINGS[dtype], device,
        )  # fmt: skip
        x = torch.randn(4, 50, generator=g).to(device, dtype)
        y = torch.randn(4, 40, generator=g).to(device, dtype)
        plan, weights = plan_of([(0,), (), (1, 0), (1,)]).to(device), torch.rand(4, 2, 1)
        terms = compute_terms(x, deltas, plan, weights.to(device))
        got = y.clone()
        apply(got, x, deltas, plan, weights.to(device), "triton")
        assert same_bits(terms.added_to(y), got)
        assert terms.touched.tolist() == [1, 0, 1, 1]


def test_terms_that_do_not_fit() -> None:
    y = torch.zeros(2, 6)
    terms = Terms(torch.zeros(2, 5), torch.ones(2, dtype=torch.int64))
    with pytest.raises(ShapeError):
        silu_and_mul(y, "triton", terms)
    with pytest.raises(ShapeError):
        silu_and_mul(y, "reference", terms)
    fitting = Terms(torch.zeros(2, 6), terms.touched)
    with pytest.raises(ShapeError):
        silu_and_mul(y, "cpu", fitting)


def test_attention_refuses_other_integers() -> None:
    step = on_device(make_step([(1, 30)], (4, 2, 32)), torch.float32, "cpu")
    with pytest.raises(ShapeError):
        replace(step, page_table=step.page_table.long()).run(backend="triton")
    with pytest.raises(ShapeError):
        paged_attention(
            step.q, *new_kv_pages(3, 16, 2, 32), step.page_table, step.query_start,
            step.context_len, 1.0, backend="triton",
        )  # fmt: skip


def test_a_plan_says_which_rows_have_members() -> None:
    plan = WorkPlan.build([(), (1,), (0, 2), ()])
    assert plan.touched.tolist() == [0, 1, 1, 0]
    room: Tensor = WorkPlan.room(4, 3).touched
    assert room.tolist() == [0, 0, 0, 0]
