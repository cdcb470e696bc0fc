"""Fusing: one mix inside the weights, and the base back bit for bit."""

from __future__ import annotations

import threading
import time
from typing import Any

import pytest
import torch

from gossamer.engine.errors import Cancelled, ShuttingDown
from gossamer.engine.fusion import DeltaCosts
from gossamer.engine.messages import Chunk, Done, Failed, Message, Request, Sampling
from gossamer.kernels.cpu import scatter
from gossamer.merge import BASE, Member, canonical
from gossamer.store.format import digest
from tests.engine.running import ask, prompts, running, started, tokens_of
from tests.engine.six_adapters import (
    ADAPTERS,
    MIXES,
    NAMES,
    TABLE,
    error_of,
    request,
    wanted,
    weights_of,
)
from tests.engine.test_mixes import random_adapter
from tests.tiny import VOCAB_SIZE, tiny_model

#: Deltas so dear that a window always pays.
DEAR = DeltaCosts(weight=10.0, entry=0.0, write=0.0)


def test_a_mix_that_all_rows_share_is_fused_and_the_base_comes_back_bit_for_bit() -> None:
    mix = canonical([Member(NAMES[0], 0.7), Member(NAMES[1], 0.6)])
    texts = prompts((5, 9, 30), VOCAB_SIZE)
    with running(tiny_model("llama"), ADAPTERS) as engine:
        before = weights_of(engine)
        answers = ask(engine, *(request(str(i), mix, text) for i, text in enumerate(texts)))
        stats = engine.stats()
        assert stats.fused_steps >= 20
        base = ask(engine, request("base"))[0]
        assert all(torch.equal(a, b) for a, b in zip(before, weights_of(engine), strict=True))
    assert [tokens_of(a) for a in answers] == [wanted(mix, text) for text in texts]
    assert tokens_of(base) == wanted(BASE)


def test_a_fused_window_closes_for_a_row_with_another_mix() -> None:
    seen = threading.Event()
    inboxes: dict[str, list[Message]] = {"long": [], "other": []}
    final = threading.Event()

    def deliver_long(message: Message) -> None:
        inboxes["long"].append(message)
        if sum(isinstance(m, Chunk) for m in inboxes["long"]) >= 5:
            seen.set()

    def deliver_other(message: Message) -> None:
        inboxes["other"].append(message)
        if isinstance(message, Done | Failed):
            final.set()

    long = Sampling(max_tokens=200, temperature=0, ignore_eos=True)
    with running(tiny_model("llama"), ADAPTERS) as engine:
        engine.submit(request("long", MIXES[0], sampling=long), deliver_long)
        assert seen.wait(30)
        assert engine.stats().fused_steps > 0
        engine.submit(request("other", MIXES[1]), deliver_other)
        assert final.wait(30)
        while not isinstance(inboxes["long"][-1], Done | Failed):
            time.sleep(0.01)
        assert engine.stats().fused_steps < engine.stats().steps
    assert tokens_of(inboxes["other"]) == wanted(MIXES[1])
    assert tokens_of(inboxes["long"]) == wanted(MIXES[0], count=200)


@pytest.mark.parametrize("at", [1, 5, 12])
def test_an_exception_inside_fuse_leaves_the_base_bit_identical(
    at: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = 0
    right = scatter.fuse_into

    def failing(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == at:
            raise MemoryError("no room for the saved weights")
        return right(*args, **kwargs)

    monkeypatch.setattr(scatter, "fuse_into", failing)
    with running(tiny_model("llama"), ADAPTERS) as engine:
        before = weights_of(engine)
        answer = ask(engine, request("a", MIXES[0]))[0]
        assert calls == at
        assert engine.stats().fused_steps == 0
        assert all(torch.equal(a, b) for a, b in zip(before, weights_of(engine), strict=True))
        assert engine.health().ready
    assert tokens_of(answer) == wanted(MIXES[0])


def test_what_cannot_be_put_back_after_a_failed_fuse_makes_the_server_not_ready(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    right = scatter.fuse_into
    calls = 0

    def fusing(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 5:
            raise MemoryError("no room for the saved weights")
        return right(*args, **kwargs)

    def restoring(*args: Any) -> None:
        raise RuntimeError("cannot write")

    monkeypatch.setattr(scatter, "fuse_into", fusing)
    monkeypatch.setattr(scatter, "restore", restoring)
    engine = started(tiny_model("llama"), ADAPTERS)
    error = error_of(engine.generate([request("a", MIXES[0])])[0])
    assert isinstance(error, ShuttingDown), "no token comes from weights that are nobody's"
    assert not engine.health().ready
    assert "cannot write" in (engine.health().reason or "")
    engine.close()


def test_a_restore_that_fails_once_after_a_failed_fuse_is_made_up_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    fuse, put_back = scatter.fuse_into, scatter.restore
    calls = {"fuse": 0, "restore": 0}

    def fusing(*args: Any, **kwargs: Any) -> Any:
        calls["fuse"] += 1
        if calls["fuse"] == 5:
            raise MemoryError("no room for the saved weights")
        return fuse(*args, **kwargs)

    def restoring(*args: Any) -> None:
        calls["restore"] += 1
        if calls["restore"] == 2:
            raise RuntimeError("cannot write")
        put_back(*args)

    monkeypatch.setattr(scatter, "fuse_into", fusing)
    monkeypatch.setattr(scatter, "restore", restoring)
    with running(tiny_model("llama"), ADAPTERS) as engine:
        before = weights_of(engine)
        assert tokens_of(ask(engine, request("a", MIXES[0]))[0]) == wanted(MIXES[0])
        assert all(torch.equal(a, b) for a, b in zip(before, weights_of(engine), strict=True))
        assert calls == {"fuse": 5, "restore": 2 + 4}
        assert engine.stats().fused_windows == 0


def test_an_exception_inside_restore_makes_the_server_not_ready(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def failing(*args: Any) -> None:
        raise RuntimeError("cannot write")

    monkeypatch.setattr(scatter, "restore", failing)
    engine = started(tiny_model("llama"), ADAPTERS)
    assert isinstance(engine.generate([request("a", MIXES[0])])[0][-1], Done)
    deadline = time.monotonic() + 5
    while engine.health().ready and time.monotonic() < deadline:
        time.sleep(0.01)
    assert "cannot write" in (engine.health().reason or "")
    with pytest.raises(ShuttingDown):
        engine.submit(request("b"), lambda _: None)
    engine.close()


def dominated(count: int) -> tuple[list[Request], list[list[int]]]:
    """Three long requests for one mix, one for another and one for the base; their answers."""
    long = Sampling(max_tokens=count, temperature=0, ignore_eos=True)
    texts = prompts((5, 9, 30, 12, 7), VOCAB_SIZE)
    mixes = [MIXES[0], MIXES[0], MIXES[0], MIXES[1], BASE]
    asked = [
        request(str(i), mix, text, long)
        for i, (mix, text) in enumerate(zip(mixes, texts, strict=True))
    ]
    return asked, [wanted(mix, text, count) for mix, text in zip(mixes, texts, strict=True)]


def test_a_mix_that_dominates_runs_fused_and_everybody_gets_the_right_tokens() -> None:
    requests, right = dominated(60)
    with running(
        tiny_model("llama"), ADAPTERS, fuse_share=0.5, fuse_hold_steps=6, fuse_cooldown=2
    ) as engine:
        engine._loop._fusion.costs = DEAR
        before = weights_of(engine)
        answers = ask(engine, *requests)
        stats = engine.stats()
        ask(engine, request("base"))
        assert all(torch.equal(a, b) for a, b in zip(before, weights_of(engine), strict=True))
    assert [tokens_of(a) for a in answers] == right
    assert stats.fused_windows >= 4
    assert 2 * 6 * 3 <= stats.held_row_steps <= 2 * 60
    assert stats.fused_steps < stats.steps


def test_by_default_a_mix_that_dominates_is_not_fused() -> None:
    requests, right = dominated(40)
    with running(tiny_model("llama"), ADAPTERS) as engine:
        engine._loop._fusion.costs = DEAR
        assert [tokens_of(a) for a in ask(engine, *requests)] == right
        assert engine.stats().held_row_steps == 0


def test_a_held_row_can_be_cancelled() -> None:
    texts = prompts((5, 9, 30), VOCAB_SIZE)
    long = Sampling(max_tokens=400, temperature=0, ignore_eos=True)
    held: list[Message] = []
    final = threading.Event()

    def deliver_held(message: Message) -> None:
        held.append(message)
        if isinstance(message, Done | Failed):
            final.set()

    with running(tiny_model("llama"), ADAPTERS, fuse_share=0.5, fuse_hold_steps=10_000) as engine:
        engine._loop._fusion.costs = DEAR
        for seconds in (0.01, 0.01, 0.01):
            engine._loop._fusion.saw(seconds)
        inboxes: list[list[Message]] = [[] for _ in texts]
        for i, text in enumerate(texts):
            engine.submit(request(f"long{i}", MIXES[0], text, long), inboxes[i].append)
        while not engine.stats().fused_steps:
            time.sleep(0.001)
        engine.submit(request("held", MIXES[1], sampling=long), deliver_held)
        while not engine.stats().held_row_steps:
            time.sleep(0.001)
        engine.cancel("held")
        assert final.wait(30)
        while not all(inbox and isinstance(inbox[-1], Done | Failed) for inbox in inboxes):
            time.sleep(0.001)
        assert engine.stats().fused_windows == 1
    assert isinstance(error_of(held), Cancelled)
    assert not any(isinstance(m, Chunk) for m in held), "it was held back from its arrival on"
    assert [tokens_of(inbox) for inbox in inboxes] == [wanted(MIXES[0], t, 400) for t in texts]


def half(dtype: torch.dtype) -> Any:
    """A tiny model in 16 bit (the seed is one whose logits pass the engine's probe)."""
    model: torch.nn.Module = tiny_model("llama", seed=2)
    return model.to(dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("settings", [{}, {"fuse_16bit": True, "fuse": False}], ids=str)
def test_sixteen_bit_weights_are_left_alone_unless_it_is_allowed(
    dtype: torch.dtype, settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    with running(half(dtype), ADAPTERS, kernels="reference", **settings) as engine:
        monkeypatch.setattr(engine._loop._runner, "deviation", None)
        assert isinstance(ask(engine, request("a", MIXES[0]))[0][-1], Done)
        assert engine.stats().fused_steps == 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_sixteen_bit_weights_are_fused_within_the_bound_and_restored(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = half(dtype)
    small = random_adapter(TABLE, "element", 0.05, 1e-4, 0)
    adapters = {**ADAPTERS, digest(small): small}
    names = {name: model.get_parameter(name).double().clone() for name in TABLE}
    with running(model, adapters, kernels="reference", fuse_16bit=True, fuse_cooldown=0) as engine:
        measured = []
        measure = engine._loop._runner.deviation

        def noted(*args: Any) -> float:
            measured.append(measure(*args))
            return measured[-1]

        monkeypatch.setattr(engine._loop._runner, "deviation", noted)
        before = weights_of(engine)
        for name in "ab":
            assert isinstance(ask(engine, request(name, MIXES[0]))[0][-1], Done)
            ask(engine, request(f"base after {name}"))
        assert engine.stats().fused_windows == 2
        assert len(measured) == 1, "the second time it is known"
        fused = engine.stats().fused_steps
        for name in "cd":  # its Δ is mostly absorbed
            answer = ask(engine, request(name, canonical([Member(digest(small), 1.0)])))[0]
            assert isinstance(answer[-1], Done)
        assert engine.stats().fused_steps == fused
        assert all(torch.equal(a, b) for a, b in zip(before, weights_of(engine), strict=True))
    for got, deltas in zip(measured, (ADAPTERS[NAMES[0]], small), strict=True):
        error = norm = 0.0
        for name, weight in names.items():
            delta = torch.from_numpy(deltas.deltas[name].dense()).double()
            error += float(((weight + delta).to(dtype).double() - weight - delta).square().sum())
            norm += float(delta.square().sum())
        assert got == pytest.approx((error / norm) ** 0.5, rel=1e-3)
    assert measured[0] < 0.05 < measured[1]


def test_a_mix_that_cannot_be_measured_is_served_unfused(monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(*args: Any) -> float:
        raise MemoryError("no room for the positions")

    with running(half(torch.float16), ADAPTERS, kernels="reference", fuse_16bit=True) as engine:
        monkeypatch.setattr(engine._loop._runner, "deviation", failing)
        assert isinstance(ask(engine, request("a", MIXES[0]))[0][-1], Done)
        assert engine.stats().fused_steps == 0
        assert engine.health().ready
