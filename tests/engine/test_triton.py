"""The engine on the Triton kernels: in the interpreter here, compiled where there is a card."""

from __future__ import annotations

from collections.abc import Sequence as Rows
from typing import Any

import pytest
import torch

from gossamer.engine.config import EngineConfig
from gossamer.engine.frames import Move, Run
from gossamer.engine.memory import Memory
from gossamer.engine.messages import Request, Sampling
from gossamer.engine.runner import Geometry, Runner
from gossamer.engine.scheduler import Work
from gossamer.engine.sequence import Sequence
from gossamer.merge import BASE, Member, Mix, canonical
from tests.engine.running import ask, running, tokens_of
from tests.engine.six_adapters import ADAPTERS, MIXES, NAMES, request, wanted, weights_of
from tests.engine.test_mixes import Tap
from tests.tiny import tiny_model

FEW = Sampling(max_tokens=3, temperature=0, ignore_eos=True)
PROMPT = (5, 9, 7)
TEXTS = ((4, 8), (6, 3, 11))

pytestmark = pytest.mark.usefixtures("interpreter")


def logits_of(
    mixes: Rows[Mix], monkeypatch: pytest.MonkeyPatch, **config: Any
) -> tuple[dict[str, torch.Tensor], set[tuple[int, tuple[int, ...] | None]]]:
    """Three greedy tokens of each mix at once: logits by request, and which graphs there are."""
    with running(tiny_model("llama"), ADAPTERS, kernels="triton", fuse=False, **config) as engine:
        for i, mix in enumerate(mixes):
            ask(engine, request(f"warm{i}", mix, (3,), Sampling(1, ignore_eos=True)))
        with monkeypatch.context() as patch:
            tap = Tap(engine, patch)
            ask(engine, *(request(str(i), m, PROMPT, FEW) for i, m in enumerate(mixes)))
        graphs = engine._loop._runner._graphs
        keys = set() if graphs is None else set(graphs._programs)
    return {name: torch.stack(rows) for name, rows in tap.rows.items()}, keys


@pytest.mark.gate
def test_interpret_graphs_compute_what_single_launches_do(monkeypatch: pytest.MonkeyPatch) -> None:
    mix = canonical([Member(NAMES[0], 0.5), Member(NAMES[1], 0.5)])
    mixes: list[Mix] = [MIXES[2], BASE, mix]
    apart, none = logits_of(mixes, monkeypatch, graphs=False)
    graphed, keys = logits_of(mixes, monkeypatch)
    assert not none
    # Three rows are padded to four. (Prompts of one token, as the warm-ups', have graphs of one.)
    assert {key for key in keys if key[0] > 1} == {(4, ())}
    for name, rows in apart.items():
        assert torch.allclose(graphed[name], rows, atol=1e-5), name
    base, found = logits_of([BASE] * 3, monkeypatch)
    assert found == {(4, None), (1, None)}
    # The same bits for a base row, whether its neighbours have adapters or not.
    assert torch.equal(base["1"], graphed["1"])


@pytest.mark.gate
def test_interpret_a_step_is_padded_beyond_the_rows_that_there_may_be() -> None:
    """Three rows at most, and their graph is that of four: its plan has room for four."""
    mixes = (MIXES[0], MIXES[1], BASE)
    with running(tiny_model("llama"), ADAPTERS, kernels="triton", fuse=False, max_rows=3) as engine:
        for i, mix in enumerate(mixes[:2]):  # resident, so that all rows join at once
            ask(engine, request(f"warm{i}", mix, (3,), Sampling(1, ignore_eos=True)))
        answers = ask(engine, *(request(str(i), m, PROMPT, FEW) for i, m in enumerate(mixes)))
        graphs = engine._loop._runner._graphs
        assert graphs is not None
        assert (4, ()) in graphs._programs
    assert [tokens_of(a) for a in answers] == [wanted(mix, PROMPT, 3) for mix in mixes]


def test_interpret_other_adapters_need_no_other_graph() -> None:
    with running(tiny_model("llama"), ADAPTERS, kernels="triton", fuse=False) as engine:
        for i, mix in enumerate(MIXES[:3]):
            answer = ask(engine, request(str(i), mix, PROMPT, FEW))[0]
            assert tokens_of(answer) == wanted(mix, PROMPT, 3)
        graphs = engine._loop._runner._graphs
        assert graphs is not None
        assert set(graphs._programs) == {(1, ())}


@pytest.mark.gate
def test_interpret_values_of_eight_bits_are_close(monkeypatch: pytest.MonkeyPatch) -> None:
    exact, _ = logits_of(MIXES[:2], monkeypatch)
    coarse, _ = logits_of(MIXES[:2], monkeypatch, int8_adapters=True)
    base, _ = logits_of([BASE] * 2, monkeypatch)
    for name, rows in exact.items():
        error = float((coarse[name][0] - rows[0]).norm())
        effect = float((base[name][0] - rows[0]).norm())
        assert 0 < error < 0.03 * effect


def test_interpret_a_row_whose_pages_move_aside_goes_on_as_before() -> None:
    config = EngineConfig(kernels="triton", max_rows=4, graphs=False)
    model = tiny_model("llama")
    size = Geometry.of(model).page_bytes(config.page_size, model.dtype, "triton")
    memory: Memory[str] = Memory(6 * size, size, config.page_size, framed=True)
    frames = memory.frames
    assert frames is not None
    runner = Runner(model, memory.pages.num_pages, config, frames.of_page)
    assert runner.frames is not None
    tokens = tuple(range(3, 22))  # two pages
    sequence = Sequence(Request("a", tokens), 0, None, 0.0)
    # The row's two pages lie at 1 and 3; others lay between them.
    frames.take(5)
    assert sequence.extend_pages(memory, config.page_size)
    frames.take(4)
    assert sequence.extend_pages(memory, len(tokens) + 1)
    frames.drop(5)
    frames.drop(4)
    runner.run([Work(sequence, 0, len(tokens))], [()], {})
    sequence.tokens.append(30)
    decode = [Work(sequence, len(tokens), 1)]
    before = runner.run(decode, [()], {})
    assert frames.of_page[sequence.pages].tolist() == [1, 3]
    assert frames.take_run(2) == (Run(4, 2), [])
    assert frames.take_run(2) == (Run(2, 2), [Move(3, 0)])
    runner.frames.move([Move(3, 0)])
    runner.frames._block[2:4] = 255  # NaN, where the adapter will be
    assert torch.equal(runner.run(decode, [()], {}), before)
    frames.of_page[sequence.pages[1]] = 3  # as if it had not been noted
    assert not torch.equal(runner.run(decode, [()], {}), before)


@pytest.mark.gate
def test_interpret_fusing_and_taking_out_again() -> None:
    mix = canonical([Member(NAMES[0], 0.7), Member(NAMES[1], 0.6)])
    long = Sampling(max_tokens=5, temperature=0, ignore_eos=True)
    with running(tiny_model("llama"), ADAPTERS, kernels="triton", fuse_min_steps=2) as engine:
        before = weights_of(engine)
        answers = ask(engine, *(request(str(i), mix, text, long) for i, text in enumerate(TEXTS)))
        assert engine.stats().fused_steps >= 4
        base = ask(engine, request("base", BASE, PROMPT, long))[0]
        assert all(torch.equal(a, b) for a, b in zip(before, weights_of(engine), strict=True))
    assert [tokens_of(answer) for answer in answers] == [wanted(mix, text, 5) for text in TEXTS]
    assert tokens_of(base) == wanted(BASE, PROMPT, 5)


@pytest.mark.gate
def test_interpret_drawing_by_rules() -> None:
    """What is drawn by a seed is the same on either backend."""
    drawn = []
    sampling = Sampling(
        max_tokens=6, temperature=0.9, top_p=0.8, seed=3, logit_bias={7: 1.0}, logprobs=2,
        presence_penalty=0.5, repetition_penalty=1.2, min_tokens=2,
    )  # fmt: skip
    for kernels in ("triton", "cpu"):
        with running(tiny_model("llama"), ADAPTERS, kernels=kernels, fuse=False) as engine:
            drawn.append(tokens_of(ask(engine, request("a", MIXES[1], PROMPT, sampling))[0]))
    assert drawn[0] == drawn[1]
