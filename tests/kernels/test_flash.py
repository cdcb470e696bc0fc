"""Attention by FlashInfer: our half of it through a stand-in, all of it where there is a card."""

from __future__ import annotations

import importlib
import inspect
import sys
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from gossamer.kernels import BackendUnavailableError, IndexRangeError, ShapeError
from gossamer.kernels.gpu import flash
from gossamer.kernels.gpu.flash import FlashInferAttention, FlashInferStep, why_not
from gossamer.kernels.tolerances import agrees
from tests.kernels.flashinfer_stand_in import (
    PARAMETERS,
    BatchPrefillWithPagedKVCacheWrapper,
    install,
    names,
)
from tests.kernels.test_attention import Step, int32, make_step
from tests.kernels.test_triton_layers import on_device

#: (query heads, kv heads, head dim): SmolLM2's, one kv head, as many kv heads, Gemma's.
HEADS = [(9, 3, 64), (8, 1, 128), (4, 4, 64), (4, 2, 256)]
#: (rows of the step, context) of each sequence; every engine's step has a row for each.
DECODE = [(1, 5), (1, 100), (1, 64), (1, 65), (1, 1), (1, 16), (1, 17)]
MIXED = [(20, 20), (1, 7), (21, 150), (3, 33), (5, 64), (1, 200)]
KINDS: list[tuple[int | None, float | None]] = [
    (None, None), (10, None), (1, None), (16, None), (70, 30.0), (None, 2.0),
]  # fmt: skip
Wrapper = type[BatchPrefillWithPagedKVCacheWrapper]


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> Wrapper:
    return install(monkeypatch)


def layers(step: Step) -> FlashInferAttention:
    """For the heads and pages of a step as `on_device` makes it."""
    size, dim = step.k_pages.shape[2:]
    return FlashInferAttention(dim, size, step.q.dtype, step.q.device)


def begun(step: Step, owner: FlashInferAttention | None = None) -> FlashInferStep:
    host = (t.cpu() for t in (step.page_table, step.query_start, step.context_len))
    return (owner or layers(step)).step(*host)


def attended(
    step: Step, window: int | None = None, softcap: float | None = None,
    started: FlashInferStep | None = None,
) -> Tensor:  # fmt: skip
    return (started or begun(step)).run(
        step.q, step.k_pages, step.v_pages, scale=step.q.shape[2] ** -0.5, sliding_window=window,
        softcap=softcap,
    )  # fmt: skip


def wanted(step: Step, dtype: torch.dtype, window: int | None, softcap: float | None) -> Tensor:
    """By the reference in float32, from the values that the narrow type holds."""
    names = ("q", "k_pages", "v_pages")
    narrow: dict[str, Any] = {name: getattr(step, name).to(dtype).float() for name in names}
    return replace(step, **narrow).run(window, softcap, "reference")


def check(
    lengths: list[tuple[int, int]], heads: tuple[int, int, int], dtype: torch.dtype, device: str,
    window: int | None, softcap: float | None,
) -> None:  # fmt: skip
    step = make_step(lengths, heads)
    want = wanted(step, dtype, window, softcap)
    got = attended(on_device(step, dtype, device), window, softcap)
    assert got.is_contiguous()
    assert agrees(got.cpu(), want)
    assert not agrees(got.cpu(), want.roll(1, 0))


@pytest.mark.usefixtures("stand_in")
@pytest.mark.parametrize("dtype", flash.DTYPES, ids=str)
@pytest.mark.parametrize(("window", "softcap"), KINDS)
@pytest.mark.parametrize("heads", HEADS, ids=str)
@pytest.mark.parametrize("lengths", [DECODE, MIXED], ids=["decode", "mixed"])
def test_what_it_is_given_means_our_step(
    lengths: list[tuple[int, int]],
    heads: tuple[int, int, int],
    window: int | None,
    softcap: float | None,
    dtype: torch.dtype,
) -> None:
    check(lengths, heads, dtype, "cpu", window, softcap)


@pytest.mark.usefixtures("stand_in")
@pytest.mark.parametrize("page", [16, 32, 48])
def test_page_sizes(page: int) -> None:
    step = make_step(MIXED, (4, 2, 64), page)
    got = attended(on_device(step, torch.float16, "cpu"), 40)
    assert agrees(got, wanted(step, torch.float16, 40, None))


def _last_position(given: dict[str, Any]) -> None:
    given["paged_kv_last_page_len"][2] -= 1


def _two_pages(given: dict[str, Any]) -> None:
    end = int(given["paged_kv_indptr"][3])  # in the window
    pages = given["paged_kv_indices"]
    pages[end - 2 : end] = pages[end - 2 : end].flip(0)


def _a_row(given: dict[str, Any]) -> None:
    given["qo_indptr"][2] += 1


def _our_window(given: dict[str, Any]) -> None:
    given["window_left"] += 1


def _no_cap(given: dict[str, Any]) -> None:
    given["logits_soft_cap"] = None


def _scale(given: dict[str, Any]) -> None:
    given["sm_scale"] *= 1.1


def _not_causal(given: dict[str, Any]) -> None:
    given["causal"] = False


@pytest.mark.parametrize(
    "corrupt", [_last_position, _two_pages, _a_row, _our_window, _no_cap, _scale, _not_causal]
)
def test_a_corrupted_plan_is_noticed(
    corrupt: Callable[[dict[str, Any]], None], stand_in: Wrapper, monkeypatch: pytest.MonkeyPatch
) -> None:
    step = make_step(MIXED, (4, 2, 64))
    want = wanted(step, torch.float16, 40, 2.0)
    placed = on_device(step, torch.float16, "cpu")
    assert agrees(attended(placed, 40, 2.0), want)
    plan = stand_in.plan

    def wrong(self: BatchPrefillWithPagedKVCacheWrapper, *args: object, **kwargs: object) -> None:
        plan(self, *args, **kwargs)
        corrupt(self.planned)

    monkeypatch.setattr(stand_in, "plan", wrong)
    assert not agrees(attended(placed, 40, 2.0), want)


def test_each_kind_of_layer_is_planned_once_a_step(stand_in: Wrapper) -> None:
    steps = [on_device(make_step(lengths, (4, 2, 64)), torch.float16, "cpu")
             for lengths in (MIXED, DECODE)]  # fmt: skip
    alone = [[attended(step, window) for window in (None, 10)] for step in steps]
    owner = layers(steps[0])
    stand_in.plans = 0
    for number, (step, (full, windowed)) in enumerate(zip(steps, alone, strict=True), 1):
        started = begun(step, owner)
        assert stand_in.plans == 2 * (number - 1)
        for window, want in ((None, full), (10, windowed), (None, full), (10, windowed)):
            assert torch.equal(attended(step, window, None, started), want)
        assert stand_in.plans == 2 * number
        assert not torch.equal(full, windowed)
    assert len(owner._wrappers) == 2


@pytest.mark.usefixtures("stand_in")
def test_queries_may_be_views_of_a_packed_projection() -> None:
    step = on_device(make_step(MIXED, (4, 2, 64)), torch.float16, "cpu")
    packed = torch.cat((step.q, torch.full_like(step.q, torch.nan)), dim=1)
    assert torch.equal(attended(replace(step, q=packed[:, :4])), attended(step))


@pytest.mark.usefixtures("stand_in")
def test_pages_outside_are_refused_before_a_launch() -> None:
    step = on_device(make_step([(1, 30), (2, 40)], (4, 2, 64)), torch.float16, "cpu")
    for page in (-1, len(step.k_pages)):
        table = step.page_table.clone()
        table[1, 2] = page
        with pytest.raises(IndexRangeError):
            attended(replace(step, page_table=table))
    table = step.page_table.clone()
    table[0, 2:] = 10**6  # behind the context
    assert torch.equal(attended(replace(step, page_table=table)), attended(step))


@pytest.mark.usefixtures("stand_in")
def test_steps_that_make_no_sense_are_refused() -> None:
    step = on_device(make_step([(1, 30), (2, 40)], (4, 2, 64)), torch.float16, "cpu")
    wrong: dict[str, Any]
    for field, values in (
        ("query_start", [1, 2, 3]),
        ("query_start", [0, 4, 3]),
        ("context_len", [30, 1]),
        ("context_len", [30, 65]),
    ):
        wrong = {field: int32(values)}
        with pytest.raises(IndexRangeError, match=field):
            begun(replace(step, **wrong))
    for field in ("page_table", "query_start", "context_len"):
        wrong = {field: getattr(step, field).long()}
        with pytest.raises(ShapeError, match=field):
            begun(replace(step, **wrong))
    with pytest.raises(ShapeError):
        begun(replace(step, query_start=step.query_start[:-1]))


@pytest.mark.usefixtures("stand_in")
def test_tensors_that_do_not_fit_are_refused() -> None:
    step = on_device(make_step([(1, 30), (2, 40)], (4, 2, 64)), torch.float16, "cpu")
    right: dict[str, Any] = {"q": step.q, "k_pages": step.k_pages, "v_pages": step.v_pages}
    begun(step).run(**right, scale=1.0)
    for wrong in (
        {"q": step.q[:2]},
        {"q": step.q[0]},
        {"q": step.q[:, :3]},
        {"q": step.q.float()},
        {"q": step.q.transpose(1, 2).contiguous().transpose(1, 2)},
        {"k_pages": step.k_pages[0]},
        {"k_pages": step.k_pages.transpose(2, 3).contiguous().transpose(2, 3)},
        {"v_pages": step.v_pages.contiguous()},
        {"v_pages": step.v_pages[:-1]},
    ):
        with pytest.raises(ShapeError):
            begun(step).run(**right | wrong, scale=1.0)


def test_what_it_does_not_take_is_refused_by_name(
    stand_in: Wrapper, monkeypatch: pytest.MonkeyPatch
) -> None:
    del stand_in
    device = torch.device("cpu")
    assert why_not(torch.bfloat16, 128) is None
    for dtype, head_dim, said in (
        (torch.float32, 128, "float16 or bfloat16, not float32"),
        (torch.float16, 80, "64, 128, 256, not 80"),
    ):
        with pytest.raises(BackendUnavailableError, match=said):
            FlashInferAttention(head_dim, 16, dtype, device)
    with monkeypatch.context() as patch:
        patch.setattr(torch.version, "hip", "6.0")
        assert "NVIDIA" in str(why_not(torch.float16))
    monkeypatch.setitem(sys.modules, "flashinfer", None)  # how Python remembers that there is none
    with pytest.raises(BackendUnavailableError, match=r"pip install 'gossamer\[flashinfer\]'"):
        FlashInferAttention(64, 16, torch.float16, device)


def test_an_installation_that_is_broken_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(name: str) -> None:
        raise ModuleNotFoundError(f"No module named 'tvm_ffi' (wanted by {name})", name="tvm_ffi")

    monkeypatch.setattr(importlib, "import_module", broken)
    assert "tvm_ffi" in str(why_not(torch.float16))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", flash.DTYPES, ids=str)
@pytest.mark.parametrize(("window", "softcap"), KINDS)
@pytest.mark.parametrize("heads", HEADS, ids=str)
@pytest.mark.parametrize("lengths", [DECODE, MIXED], ids=["decode", "mixed"])
def test_the_real_one(
    lengths: list[tuple[int, int]],
    heads: tuple[int, int, int],
    window: int | None,
    softcap: float | None,
    dtype: torch.dtype,
) -> None:
    pytest.importorskip("flashinfer")
    check(lengths, heads, dtype, "cuda", window, softcap)


@pytest.mark.gpu
def test_the_real_one_plans_a_step_while_the_last_one_runs() -> None:
    """Back to back without a word from the host between: each must still have its own plan."""
    pytest.importorskip("flashinfer")
    steps = [on_device(make_step(lengths, (4, 2, 64), seed=i), torch.float16, "cuda")
             for i, lengths in enumerate([MIXED, DECODE] * 8)]  # fmt: skip
    owner = layers(steps[0])
    got = [attended(step, started=begun(step, owner)) for step in steps]
    for i, lengths in enumerate([MIXED, DECODE] * 8):
        want = wanted(make_step(lengths, (4, 2, 64), seed=i), torch.float16, None, None)
        assert agrees(got[i].cpu(), want)


@pytest.mark.gpu
@pytest.mark.parametrize("method", PARAMETERS)
def test_the_real_one_has_the_parameters_that_were_recorded(method: str) -> None:
    real = pytest.importorskip("flashinfer").BatchPrefillWithPagedKVCacheWrapper
    parameters = inspect.signature(getattr(real, method)).parameters.values()
    found = [p.name for p in parameters if p.kind is not inspect.Parameter.VAR_POSITIONAL]
    # A later version may have more behind those that we know.
    assert [name for name in found if name in names(method)] == names(method)
