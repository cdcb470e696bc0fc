"""What a request may ask for, and how it leaves early."""

from __future__ import annotations

import threading
import time

import pytest
import torch

from gossamer.engine.errors import Cancelled, Overloaded, ShuttingDown
from gossamer.engine.messages import ChoiceEnd, Done, Failed, Message, PromptScored, Sampling
from gossamer.merge import BASE
from tests.engine.running import TOKENIZER, ask, prompts, running, started, text_of, tokens_of
from tests.engine.six_adapters import ADAPTERS, MIXES, MODEL, error_of, request, wanted
from tests.tiny import VOCAB_SIZE, tiny_model


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
    engine = started(tiny_model("llama"), ADAPTERS)
    inbox: list[Message] = []
    engine.submit(request("a"), inbox.append)
    engine.drain(30.0)
    assert tokens_of(inbox) == wanted(BASE)
    with pytest.raises(ShuttingDown):
        engine.submit(request("b"), inbox.append)


def test_a_full_queue_refuses_and_a_long_wait_ends() -> None:
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
        while not inboxes[1]:
            time.sleep(0.005)
        engine.cancel("running")
    assert isinstance(error_of(inboxes[1]), Overloaded)
