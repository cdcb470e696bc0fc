"""Fusing: one mix inside the weights, and the base back bit for bit."""

from __future__ import annotations

import threading
import time
from typing import Any

import pytest
import torch

from gossamer.engine import runner as runner_module
from gossamer.engine.errors import ShuttingDown
from gossamer.engine.messages import Chunk, Done, Failed, Message, Sampling
from gossamer.merge import BASE, Member, canonical
from tests.engine.running import ask, prompts, running, started, tokens_of
from tests.engine.six_adapters import ADAPTERS, MIXES, NAMES, request, wanted, weights_of
from tests.tiny import VOCAB_SIZE, tiny_model


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
    right = runner_module.fuse_into  # type: ignore[attr-defined]

    def failing(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == at:
            raise MemoryError("no room for the saved weights")
        return right(*args, **kwargs)

    monkeypatch.setattr(runner_module, "fuse_into", failing)
    with running(tiny_model("llama"), ADAPTERS) as engine:
        before = weights_of(engine)
        answer = ask(engine, request("a", MIXES[0]))[0]
        assert calls == at
        assert engine.stats().fused_steps == 0
        assert all(torch.equal(a, b) for a, b in zip(before, weights_of(engine), strict=True))
        assert engine.health().ready
    assert tokens_of(answer) == wanted(MIXES[0])


def test_an_exception_inside_restore_makes_the_server_not_ready(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def failing(*args: Any) -> None:
        raise RuntimeError("cannot write")

    monkeypatch.setattr(runner_module, "restore", failing)
    engine = started(tiny_model("llama"), ADAPTERS)
    assert isinstance(engine.generate([request("a", MIXES[0])])[0][-1], Done)
    deadline = time.monotonic() + 5
    while engine.health().ready and time.monotonic() < deadline:
        time.sleep(0.01)
    assert engine.health().reason is not None
    with pytest.raises(ShuttingDown):
        engine.submit(request("b"), lambda _: None)
    engine.close()
