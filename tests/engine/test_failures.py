"""Failures stay their request's: bad files, bad values, exceptions, bad requests."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch

from gossamer.engine.errors import (
    AdapterUnavailable,
    ContextLengthExceeded,
    InvalidRequest,
    NonFiniteLogits,
    ShuttingDown,
    StepFailed,
)
from gossamer.engine.messages import Message, Request, Sampling
from gossamer.engine.scheduler import Work
from gossamer.merge import BASE, Member, canonical
from gossamer.store.delta import Delta, DeltaSet
from gossamer.store.format import digest
from tests.engine.running import ask, running, started, tokens_of
from tests.engine.six_adapters import ADAPTERS, MIXES, NAMES, TABLE, error_of, request, wanted
from tests.tiny import VOCAB_SIZE, tiny_model


def test_an_adapter_that_cannot_be_read_fails_its_own_request_and_may_work_later() -> None:
    adapters = dict(ADAPTERS)
    broken = adapters.pop(NAMES[0])
    with running(tiny_model("llama"), adapters) as engine:
        bad, good = ask(engine, request("bad", MIXES[0]), request("good", MIXES[1]))
        error = error_of(bad)
        assert isinstance(error, AdapterUnavailable)
        assert error.digest == NAMES[0]
        assert tokens_of(good) == wanted(MIXES[1])
        adapters[NAMES[0]] = broken
        assert tokens_of(ask(engine, request("again", MIXES[0]))[0]) == wanted(MIXES[0])


def test_an_adapter_of_another_shape_is_refused_before_a_kernel_sees_it() -> None:
    name = "model.layers.0.self_attn.v_proj.weight"
    rows, columns = TABLE[name]
    wrong = DeltaSet("x", "x", {name: Delta.element((rows, columns + 1), [5], [1.0])})
    adapters = {digest(wrong): wrong}
    with running(tiny_model("llama"), adapters) as engine:
        answer = ask(engine, request("a", canonical([Member(digest(wrong), 1.0)])))[0]
    error = error_of(answer)
    assert isinstance(error, AdapterUnavailable)
    assert "shape" in str(error)


def test_an_adapter_that_makes_nan_fails_alone_and_leaves_no_trace() -> None:
    name = "model.layers.0.self_attn.v_proj.weight"
    values = np.full(3, 3e38, np.float32)  # past the validator: finite, but not for long
    delta = Delta("element", TABLE[name], 1, np.arange(3), values, "F32")
    poison = DeltaSet("x", "x", {name: delta})
    adapters = {**ADAPTERS, digest(poison): poison}
    mix = canonical([Member(digest(poison), 16.0)])
    with running(
        tiny_model("llama"), adapters, memory_bytes=1 << 22, kernels="cpu", fuse=False
    ) as engine:
        clean = ask(engine, request("m1"), request("b1"))
        bad, mate = ask(engine, request("bad", mix), request("mate"))
        assert isinstance(error_of(bad), NonFiniteLogits)
        assert tokens_of(mate) == wanted(BASE)
        # The pages of the failed request go to the next owner; nothing of them may be seen.
        for i in range(3):
            long = ask(engine, request(f"next{i}", salt=bytes([i])), request(f"n{i}", MIXES[0]))
            assert tokens_of(long[0]) == tokens_of(clean[0])
            assert tokens_of(long[1]) == wanted(MIXES[0])
        assert isinstance(error_of(ask(engine, request("bad2", mix))[0]), NonFiniteLogits)


def test_a_device_that_is_lost_ends_the_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = started(tiny_model("llama"), ADAPTERS)

    def lost(*args: Any, **kwargs: Any) -> Any:
        raise torch.AcceleratorError("an illegal memory access was encountered")

    monkeypatch.setattr(engine._loop._runner, "run", lost)
    assert isinstance(error_of(engine.generate([request("a")])[0]), ShuttingDown)
    assert "illegal memory access" in (engine.health().reason or "")
    engine.close()


def test_an_exception_in_one_rows_step_fails_that_row_only(monkeypatch: pytest.MonkeyPatch) -> None:
    with running(tiny_model("llama"), ADAPTERS) as engine:
        runner = engine._loop._runner
        right = runner.run

        def failing(work: Sequence[Work], *args: Any, **kwargs: Any) -> torch.Tensor:
            if any(w.sequence.request.id == "bad" and w.sequence.output_length == 3 for w in work):
                raise ValueError("boom")
            return right(work, *args, **kwargs)

        monkeypatch.setattr(runner, "run", failing)
        answers = ask(engine, request("one", MIXES[0]), request("bad", MIXES[1]), request("two"))
    assert isinstance(error_of(answers[1]), StepFailed)
    assert tokens_of(answers[0]) == wanted(MIXES[0])
    assert tokens_of(answers[2]) == wanted(BASE)


def test_a_receiver_that_raises_harms_nobody() -> None:
    def raising(message: Message) -> None:
        raise RuntimeError("the event loop is closed")

    with running(tiny_model("llama"), ADAPTERS) as engine:
        engine.submit(request("deaf", MIXES[0]), raising)
        assert tokens_of(ask(engine, request("b"))[0]) == wanted(BASE)
        assert engine.health().ready


def test_when_the_thread_dies_everyone_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = started(tiny_model("llama"), ADAPTERS)

    def dying() -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(engine._loop.scheduler, "schedule", dying)
    answers = engine.generate([request("a"), request("b")])
    assert [type(error_of(a)) for a in answers] == [ShuttingDown, ShuttingDown]
    assert not engine.health().ready
    with pytest.raises(ShuttingDown):
        engine.submit(request("c"), lambda _: None)
    engine.close()


@pytest.mark.parametrize(
    ("bad", "field"),
    [
        (request("x", prompt=()), "prompt"),
        (request("x", prompt=(VOCAB_SIZE,)), "prompt"),
        (request("x", prompt=(-1,)), "prompt"),
        (request("x", sampling=Sampling(max_tokens=2000)), None),
        (request("x", sampling=Sampling(max_tokens=-1)), "max_tokens"),
        (request("x", sampling=Sampling(n=0)), "n"),
        (request("x", sampling=Sampling(temperature=-0.5)), "temperature"),
        (request("x", sampling=Sampling(temperature=float("nan"))), "temperature"),
        (request("x", sampling=Sampling(seed=2**63)), "seed"),
        (request("x", sampling=Sampling(logit_bias={VOCAB_SIZE: 1.0})), "logit_bias"),
        (request("x", sampling=Sampling(stop_token_ids=(-1,))), "stop_token_ids"),
    ],
)
def test_a_bad_request_is_refused_at_once(bad: Request, field: str | None) -> None:
    with running(tiny_model("llama")) as engine:
        with pytest.raises(ContextLengthExceeded if field is None else InvalidRequest) as refused:
            engine.submit(bad, lambda _: None)
        assert getattr(refused.value, "field", None) == field
        assert tokens_of(ask(engine, request("x"))[0]) == wanted(BASE)
