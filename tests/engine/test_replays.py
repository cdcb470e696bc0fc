"""Steps from programs: bit for bit what the kernels give one by one, whatever the rows do."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from torch import Tensor

from gossamer.engine import replays
from gossamer.engine.client import Engine
from gossamer.engine.messages import Request, Sampling
from gossamer.engine.replays import MOST_ROWS, StackReplays
from gossamer.engine.short_modules import LayerStack
from gossamer.kernels import NotCapturableError
from gossamer.kernels.cpu import linear as cpu_linear
from gossamer.merge import BASE, Member, canonical
from tests.engine.running import ask, prompts, running, tokens_of
from tests.engine.six_adapters import ADAPTERS, MIXES, NAMES, TEXT, request, wanted
from tests.engine.test_mixes import run_batch
from tests.tiny import ARCHS, VOCAB_SIZE, tiny_model

#: Architectures all of whose layers are made of our modules.
STACKED = ("llama", "mistral", "qwen2")


@pytest.fixture(autouse=True)
def _on_any_processor(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu_linear, "_wide_vectors", lambda: True)


def stack_of(engine: Engine) -> LayerStack | None:
    stacks = [m for m in engine._loop._runner._model.modules() if isinstance(m, LayerStack)]
    assert len(stacks) <= 1
    return stacks[0] if stacks else None


def programs_of(engine: Engine) -> StackReplays:
    stack = stack_of(engine)
    assert stack is not None
    assert isinstance(stack.replays, StackReplays)
    return stack.replays


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, bool]]:
    """Of every step whose layers ran: its rows, and whether a program ran them."""
    seen: list[tuple[int, bool]] = []
    run = StackReplays.run

    def noted(self: StackReplays, stack: LayerStack, x: Tensor, *others: object) -> Tensor | None:
        out = run(self, stack, x, *others)  # type: ignore[arg-type]
        seen.append((len(x), out is not None))
        return out

    monkeypatch.setattr(StackReplays, "run", noted)
    return seen


def many() -> list[Request]:
    """Rows that come and go, with and without adapters, of unequal lengths."""
    texts = prompts((3, 9, 30, 5, 17, 2, 40, 11), VOCAB_SIZE)
    mixes = [
        MIXES[0],
        BASE,
        MIXES[1],
        canonical([Member(n, 0.5) for n in NAMES[:3]]),
        MIXES[2],
        BASE,
        MIXES[5],
        canonical([Member(NAMES[3], -1.0), Member(NAMES[4], 0.25)]),
    ]
    return [
        Request(f"r{i}", text, mix, Sampling(max_tokens=6 + 5 * i, temperature=0, ignore_eos=True))
        for i, (text, mix) in enumerate(zip(texts, mixes, strict=True))
    ]


@pytest.mark.parametrize("arch", STACKED)
def test_every_step_has_the_bits_of_the_kernels_one_by_one(
    arch: str, steps: list[tuple[int, bool]], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = {"max_rows": 6, "max_step_tokens": 48, "max_mixed_step_tokens": 20}
    replayed, tokens = run_batch(tiny_model(arch), ADAPTERS, many(), monkeypatch, **config)
    assert {(rows <= MOST_ROWS, by_program) for rows, by_program in steps} == {
        (True, True),
        (False, False),
    }
    monkeypatch.setattr(StackReplays, "run", lambda *_: None)
    plain, same = run_batch(tiny_model(arch), ADAPTERS, many(), monkeypatch, **config)
    assert tokens == same
    assert replayed.compositions == plain.compositions
    for name, rows in plain.rows.items():
        assert torch.equal(torch.stack(replayed.rows[name]), torch.stack(rows))


@pytest.mark.parametrize("arch", ARCHS)
def test_which_models_have_a_stack(arch: str) -> None:
    with running(tiny_model(arch)) as engine:
        assert (stack_of(engine) is not None) == (arch in STACKED)


def test_the_reference_has_no_programs() -> None:
    with running(tiny_model("llama"), kernels="reference") as engine:
        stack = stack_of(engine)
        assert stack is not None
        assert stack.replays is None


def test_sequences_that_outgrow_the_page_table(
    monkeypatch: pytest.MonkeyPatch, steps: list[tuple[int, bool]]
) -> None:
    monkeypatch.setattr(replays, "_FIRST_WIDTH", 1)
    with running(tiny_model("llama"), ADAPTERS) as engine:
        (answer,) = ask(engine, request("long", MIXES[0]))
        memory = programs_of(engine)._memory
        assert memory is not None
        assert memory.width == 2  # 12 + 20 tokens in pages of 16
    assert tokens_of(answer) == wanted(MIXES[0])
    assert all(by_program for _, by_program in steps)


def test_more_members_than_there_is_room_for(steps: list[tuple[int, bool]]) -> None:
    mix = canonical([Member(name, 0.2) for name in NAMES[:3]])
    with running(tiny_model("llama"), ADAPTERS, fuse=False) as engine:
        programs_of(engine)._delta_memory._members = 2
        steps.clear()  # those of the probe, which have no deltas
        (answer,) = ask(engine, request("three", mix))
    assert tokens_of(answer) == wanted(mix)
    assert not any(by_program for _, by_program in steps)


def test_steps_that_cannot_be_captured_are_tried_once(monkeypatch: pytest.MonkeyPatch) -> None:
    with running(tiny_model("llama"), ADAPTERS) as engine:
        pool, tried = programs_of(engine)._pool, []
        programs_of(engine)._programs.clear()  # those of the probe

        def refuse(function: object) -> None:
            tried.append(function)
            raise NotCapturableError("anything")

        monkeypatch.setattr(pool, "capture", refuse)
        answers = ask(engine, request("a"), request("b", MIXES[1]))
    assert [tokens_of(a) for a in answers] == [wanted(BASE), wanted(MIXES[1])]
    assert len(tried) == len(programs_of(engine)._programs) in range(2, 7)


def test_nothing_is_left_of_an_adapter_that_was_evicted() -> None:
    with running(tiny_model("llama"), ADAPTERS) as engine:
        ask(engine, request("one", MIXES[0]), request("base"))
        entry = engine._memory.get(NAMES[0])
        assert entry is not None
        packed = weakref.ref(next(iter(entry.payload.deltas.values())).data)
        ask(engine, request("alone"))  # a step without it
        engine._memory.make_room(engine._memory.total_bytes)
        assert engine.resident() == {}
        del entry
        gc.collect()
        assert packed() is None
        (answer,) = ask(engine, request("again", MIXES[0], TEXT))
    assert tokens_of(answer) == wanted(MIXES[0])
