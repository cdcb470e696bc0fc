"""The running engine: fusing, eviction, failures that stay their request's, leaving early."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch

from gossamer.base.patch_map import adapter_table
from gossamer.engine import runner as runner_module
from gossamer.engine.client import Engine
from gossamer.engine.config import EngineConfig
from gossamer.engine.errors import (
    AdapterTooLarge,
    AdapterUnavailable,
    Cancelled,
    ContextLengthExceeded,
    EngineError,
    InvalidRequest,
    NonFiniteLogits,
    Overloaded,
    ShuttingDown,
    StepFailed,
)
from gossamer.engine.messages import (
    ChoiceEnd,
    Chunk,
    Done,
    Failed,
    Message,
    PromptScored,
    Request,
    Sampling,
)
from gossamer.engine.scheduler import Work
from gossamer.merge import BASE, Member, Mix, canonical
from gossamer.store.delta import Delta, DeltaSet
from gossamer.store.format import digest
from tests.engine.running import TOKENIZER, ask, generate, prompts, running, text_of, tokens_of
from tests.engine.test_mixes import dense, random_adapter
from tests.tiny import VOCAB_SIZE, tiny_model

MODEL = tiny_model("llama")
TABLE = adapter_table(MODEL)
SETS = [random_adapter(TABLE, "element", 0.05, 0.1, seed) for seed in range(6)]
ADAPTERS = {digest(s): s for s in SETS}
NAMES = list(ADAPTERS)
MIXES = [canonical([Member(name, 1.0)]) for name in NAMES]
GREEDY = Sampling(max_tokens=20, temperature=0, ignore_eos=True)
TEXT = prompts((12,), VOCAB_SIZE)[0]


def request(
    name: str,
    mix: Mix = BASE,
    prompt: tuple[int, ...] = TEXT,
    sampling: Sampling = GREEDY,
    **more: Any,
) -> Request:
    return Request(name, prompt, mix, sampling, **more)


def wanted(mix: Mix, prompt: tuple[int, ...] = TEXT, count: int = 20) -> list[int]:
    return generate(dense(MODEL, mix, ADAPTERS), prompt, count)


def error_of(messages: Sequence[Message]) -> EngineError:
    final = messages[-1]
    assert isinstance(final, Failed), final
    return final.error


def weights_of(engine: Engine) -> list[torch.Tensor]:
    return [p.weight.detach().clone() for p in engine._loop._runner._products.values()]


# -- fusing


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
    engine = Engine(
        tiny_model("llama"),
        TOKENIZER,
        ADAPTERS.__getitem__,
        EngineConfig(memory_bytes=1 << 26),
        fingerprint="x",
    )
    engine.start()
    assert isinstance(engine.generate([request("a", MIXES[0])])[0][-1], Done)
    deadline = time.monotonic() + 5
    while engine.health().ready and time.monotonic() < deadline:
        time.sleep(0.01)
    assert engine.health().reason is not None
    with pytest.raises(ShuttingDown):
        engine.submit(request("b"), lambda _: None)
    engine.close()


# -- memory


def test_more_adapters_than_fit_are_loaded_and_evicted_and_stay_right() -> None:
    with running(tiny_model("llama"), ADAPTERS, prefix_sharing=False) as engine:
        ask(engine, request("size", MIXES[0]))
        (size,) = engine.resident().values()
    with running(tiny_model("llama"), ADAPTERS, memory_bytes=int(size * 2.7), fuse=False) as engine:
        for turn in range(2):
            for i, mix in enumerate(MIXES):
                answer = ask(engine, request(f"{turn}-{i}", mix))[0]
                assert tokens_of(answer) == wanted(mix)
                assert len(engine.resident()) <= 2
        stats = engine.stats()
        assert stats.loads == 12
        assert stats.evictions >= 10
        assert stats.adapter_bytes + stats.kv_bytes <= stats.memory_bytes


def test_an_adapter_that_cannot_fit_is_refused_and_nothing_is_evicted() -> None:
    huge = random_adapter(TABLE, "element", 0.9, 0.1, 99)
    adapters = {**ADAPTERS, digest(huge): huge}
    with running(tiny_model("llama"), ADAPTERS) as engine:
        ask(engine, request("size", MIXES[0]))
        (size,) = engine.resident().values()
    with running(tiny_model("llama"), adapters, memory_bytes=size * 3, fuse=False) as engine:
        ask(engine, request("a", MIXES[0]))
        before = engine.resident()
        big, small = ask(
            engine, request("huge", canonical([Member(digest(huge), 1.0)])), request("c", MIXES[0])
        )
        assert isinstance(error_of(big), AdapterTooLarge)
        assert tokens_of(small) == wanted(MIXES[0])
        assert engine.resident() == before


def test_a_compiled_mix_equals_the_dense_formula() -> None:
    members = [Member(NAMES[i], w) for i, w in ((0, 1.0), (1, 0.8), (2, -0.5))]
    mix = canonical(members, "overlap_mean")
    model = tiny_model("llama")
    for name in TABLE:
        parts = [(m.weight, ADAPTERS[m.digest].deltas[name]) for m in mix.members]
        total = sum(w * d.dense().astype(np.float64) for w, d in parts)
        count = np.zeros(TABLE[name])
        for _, delta in parts:
            count.reshape(-1)[delta.positions] += 1
        model.get_parameter(name).data += torch.from_numpy(total / np.maximum(count, 1)).float()
    right = generate(model, TEXT, 20)
    with running(tiny_model("llama"), ADAPTERS) as engine:
        first, base, again = ask(engine, request("m", mix), request("b"), request("m2", mix))
    assert tokens_of(first) == tokens_of(again) == right
    assert tokens_of(base) == wanted(BASE)
    assert right != wanted(canonical(members))


# -- failures


def test_an_adapter_that_cannot_be_read_fails_its_own_request_and_may_work_later() -> None:
    adapters = dict(ADAPTERS)
    broken = adapters.pop(NAMES[0])
    engine_adapters = dict(adapters)

    def source(name: str) -> DeltaSet:
        return engine_adapters[name]

    engine = Engine(
        tiny_model("llama"), TOKENIZER, source, EngineConfig(memory_bytes=1 << 26), fingerprint="x"
    )
    engine.start()
    bad, good = engine.generate([request("bad", MIXES[0]), request("good", MIXES[1])])
    error = error_of(bad)
    assert isinstance(error, AdapterUnavailable)
    assert error.digest == NAMES[0]
    assert tokens_of(good) == wanted(MIXES[1])
    engine_adapters[NAMES[0]] = broken
    assert tokens_of(engine.generate([request("again", MIXES[0])])[0]) == wanted(MIXES[0])
    engine.close()


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


def test_when_the_thread_dies_everyone_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = Engine(
        tiny_model("llama"),
        TOKENIZER,
        ADAPTERS.__getitem__,
        EngineConfig(memory_bytes=1 << 26),
        fingerprint="x",
    )
    engine.start()

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
    ("bad", "error"),
    [
        (request("x", prompt=()), InvalidRequest),
        (request("x", prompt=(VOCAB_SIZE,)), InvalidRequest),
        (request("x", prompt=(-1,)), InvalidRequest),
        (request("x", sampling=Sampling(max_tokens=2000)), ContextLengthExceeded),
        (request("x", sampling=Sampling(logit_bias={VOCAB_SIZE: 1.0})), InvalidRequest),
        (request("x", sampling=Sampling(stop_token_ids=(-1,))), InvalidRequest),
    ],
)
def test_a_bad_request_is_refused_at_once(bad: Request, error: type[EngineError]) -> None:
    with running(tiny_model("llama")) as engine:
        with pytest.raises(error):
            engine.submit(bad, lambda _: None)
        assert tokens_of(ask(engine, request("x"))[0]) == wanted(BASE)


# -- leaving early


def test_a_cancelled_request_frees_what_it_held() -> None:
    started, ended = threading.Event(), threading.Event()
    inbox: list[Message] = []

    def deliver(message: Message) -> None:
        inbox.append(message)
        started.set()
        if isinstance(message, Done | Failed):
            ended.set()

    long = Sampling(max_tokens=900, temperature=0, ignore_eos=True)
    with running(tiny_model("llama"), ADAPTERS) as engine:
        engine.submit(request("long", MIXES[0], sampling=long), deliver)
        assert started.wait(30)
        at = time.monotonic()
        engine.cancel("long")
        assert ended.wait(1.0)
        assert time.monotonic() - at < 1.0
        engine.cancel("long")
        engine.cancel("never existed")
        assert engine.stats().running == 0
        assert engine._memory.pages.held == 0
    assert isinstance(error_of(inbox), Cancelled)


def test_draining_finishes_what_runs_and_refuses_what_comes() -> None:
    engine = Engine(
        tiny_model("llama"),
        TOKENIZER,
        ADAPTERS.__getitem__,
        EngineConfig(memory_bytes=1 << 26),
        fingerprint="x",
    )
    engine.start()
    inbox: list[Message] = []
    engine.submit(request("a"), inbox.append)
    engine.drain(30.0)
    assert tokens_of(inbox) == wanted(BASE)
    with pytest.raises(ShuttingDown):
        engine.submit(request("b"), inbox.append)


def test_a_full_queue_refuses_and_a_long_wait_ends() -> None:
    hold = threading.Event()
    with running(tiny_model("llama"), max_rows=1, max_waiting=2, queue_timeout=0.2) as engine:
        long = Sampling(max_tokens=900, temperature=0, ignore_eos=True)
        inboxes: list[list[Message]] = [[] for _ in range(2)]
        engine.submit(request("running", sampling=long), inboxes[0].append)
        while engine.stats().running == 0:
            time.sleep(0.005)
        engine.submit(request("waiting"), inboxes[1].append)
        while engine.stats().waiting == 0 and not inboxes[1]:
            time.sleep(0.005)
        with pytest.raises(Overloaded):
            engine.submit(request("three", sampling=Sampling(n=2)), lambda _: None)
        hold.wait(1.0)
        engine.cancel("running")
    finals = [type(m[-1].error) for m in inboxes if isinstance(m[-1], Failed)]
    assert finals in ([Cancelled, Overloaded], [Cancelled])


# -- what a request may ask for


def test_several_choices_share_the_prompt_and_differ_by_seed() -> None:
    text = prompts((40,), VOCAB_SIZE)[0]
    sampling = Sampling(max_tokens=12, temperature=1.0, seed=5, n=3, ignore_eos=True)
    with running(tiny_model("llama"), ADAPTERS) as engine:
        first = ask(engine, request("a", MIXES[0], text, sampling))[0]
        computed = engine.stats().prompt_tokens
        again = ask(engine, request("b", MIXES[0], text, sampling), request("c", MIXES[1]))[0]
    choices = [tokens_of(first, i) for i in range(3)]
    assert len({tuple(c) for c in choices}) == 3
    assert [tokens_of(again, i) for i in range(3)] == choices
    assert computed == 40 + 2 * (40 - 32)
    done = first[-1]
    assert isinstance(done, Done)
    assert (done.prompt_tokens, done.completion_tokens) == (40, 36)


def test_prompt_scores_are_the_log_softmax_of_the_model() -> None:
    text = prompts((30,), VOCAB_SIZE)[0]
    with torch.inference_mode():
        logprobs = torch.log_softmax(MODEL(torch.tensor([text])).logits[0].double(), -1)
    sampling = Sampling(max_tokens=0, prompt_logprobs=2, temperature=0)
    with running(tiny_model("llama"), max_step_tokens=16) as engine:
        answer, other = ask(engine, request("a", prompt=text, sampling=sampling), request("b"))
    assert tokens_of(other) == wanted(BASE)
    scored = answer[0]
    assert isinstance(scored, PromptScored)
    assert scored.tokens[0] is None
    assert len(scored.tokens) == 30
    for i, got in enumerate(scored.tokens[1:], start=1):
        assert got is not None
        assert got.token == text[i]
        assert got.logprob == pytest.approx(float(logprobs[i - 1, text[i]]), abs=1e-4)
        assert [t for t, _ in got.top] == logprobs[i - 1].topk(2).indices.tolist()
    assert isinstance(answer[-1], Done)
    assert answer[-1].completion_tokens == 0


def test_the_end_of_a_text() -> None:
    tokens = wanted(BASE)
    whole = str(TOKENIZER.decode(tokens))
    assert len(whole) > 12
    stop = whole[5:8]
    with running(tiny_model("llama")) as engine:
        by_string, by_token, by_length, late = ask(
            engine,
            request("s", sampling=Sampling(20, temperature=0, ignore_eos=True, stop=(stop,))),
            request("t", sampling=Sampling(20, temperature=0, stop_token_ids=(tokens[4],))),
            request("l", sampling=Sampling(3, temperature=0, ignore_eos=True)),
            request(
                "m", sampling=Sampling(20, temperature=0, stop_token_ids=(tokens[0],), min_tokens=6)
            ),
        )
    end = next(m for m in by_string if isinstance(m, ChoiceEnd))
    assert (end.reason, end.matched) == ("stop", stop)
    assert text_of(by_string) == whole[: whole.index(stop)]
    end = next(m for m in by_token if isinstance(m, ChoiceEnd))
    assert (end.reason, end.matched) == ("stop", tokens[4])
    assert tokens_of(by_token) == tokens[: tokens.index(tokens[4]) + 1]
    end = next(m for m in by_length if isinstance(m, ChoiceEnd))
    assert (end.reason, end.matched) == ("length", None)
    assert tokens_of(by_length) == tokens[:3]
    assert len(tokens_of(late)) >= 6
    assert tokens[0] not in tokens_of(late)[:6]


# -- many at once


def test_adapters_that_do_not_fit_together_take_turns() -> None:
    with running(tiny_model("llama"), ADAPTERS, prefix_sharing=False) as engine:
        ask(engine, request("size", MIXES[0]))
        (size,) = engine.resident().values()
    with running(
        tiny_model("llama"), ADAPTERS, memory_bytes=int(size * 1.8), fuse=False, loader_threads=2
    ) as engine:
        answers = ask(engine, *(request(f"r{i}", MIXES[i % 6]) for i in range(12)))
        assert engine.stats().loads <= 12
    for i, answer in enumerate(answers):
        assert tokens_of(answer) == wanted(MIXES[i % 6])


def test_a_mix_whose_members_do_not_fit_together_is_refused() -> None:
    with running(tiny_model("llama"), ADAPTERS, prefix_sharing=False) as engine:
        ask(engine, request("size", MIXES[0]))
        (size,) = engine.resident().values()
    mix = canonical([Member(NAMES[0], 0.5), Member(NAMES[1], 0.5)])
    with running(tiny_model("llama"), ADAPTERS, memory_bytes=int(size * 1.8)) as engine:
        both, one = ask(engine, request("both", mix), request("one", MIXES[2]))
    assert isinstance(error_of(both), AdapterTooLarge)
    assert tokens_of(one) == wanted(MIXES[2])


def test_a_compiled_mix_without_overlap_survives_eviction_of_others() -> None:
    """Members with disjoint supports need no correction; the mix must stay known all the same."""
    half = [
        DeltaSet(
            "test",
            "test",
            {
                name: Delta.element(d.shape, d.positions[i::2], d.values_f32()[i::2] * 1.0)
                for name, d in SETS[0].deltas.items()
            },
        )
        for i in (0, 1)
    ]
    adapters = {**ADAPTERS, **{digest(h): h for h in half}}
    mix = canonical([Member(digest(h), 1.0) for h in half], "overlap_mean")
    with running(tiny_model("llama"), ADAPTERS, prefix_sharing=False) as engine:
        ask(engine, request("size", MIXES[0]))
        (size,) = engine.resident().values()
    with running(tiny_model("llama"), adapters, memory_bytes=int(size * 3.2), fuse=False) as engine:
        answers = ask(engine, request("m", mix), *(request(f"r{i}", MIXES[i]) for i in range(6)))
        again = ask(engine, request("m2", mix))[0]
    assert tokens_of(answers[0]) == tokens_of(again) == wanted(MIXES[0])


def test_a_receiver_that_raises_harms_nobody() -> None:
    def raising(message: Message) -> None:
        raise RuntimeError("the event loop is closed")

    with running(tiny_model("llama"), ADAPTERS) as engine:
        engine.submit(request("deaf", MIXES[0]), raising)
        assert tokens_of(ask(engine, request("b"))[0]) == wanted(BASE)
        assert engine.health().ready


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
