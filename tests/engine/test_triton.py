"""The engine on the Triton kernels: in the interpreter here, compiled where there is a card."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch

from gossamer.engine.messages import Sampling
from gossamer.merge import BASE, Member, Mix, canonical
from tests.engine.running import ask, running, tokens_of
from tests.engine.six_adapters import ADAPTERS, MIXES, NAMES, request, wanted
from tests.engine.test_mixes import Tap, check_batch
from tests.tiny import ARCHS, tiny_model

#: Short prompts: the interpreter takes a tenth of a second a row. One is cut by the step's budget.
LENGTHS = (2, 3, 4, 2, 3, 4, 5, 2, 3, 20, 2, 3)
FEW = Sampling(max_tokens=3, temperature=0, ignore_eos=True)
PROMPT = (5, 9, 7)

pytestmark = pytest.mark.usefixtures("interpreter")


# llama: all layers are short modules, which add the deltas' terms; qwen3: transformers' own.
@pytest.mark.parametrize("arch", ["llama", "qwen3"])
def test_interpret_every_row_gets_its_own_mix(arch: str, monkeypatch: pytest.MonkeyPatch) -> None:
    check_batch(
        tiny_model(arch), 0.1, 3, monkeypatch, LENGTHS,
        kernels="triton", max_step_tokens=48, max_mixed_step_tokens=40,
    )  # fmt: skip


@pytest.mark.gpu
@pytest.mark.parametrize("arch", ARCHS)
def test_every_row_gets_its_own_mix_on_a_card(arch: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model(arch)
    torch.nn.Module.to(model, "cuda")
    check_batch(model, 0.1, 12, monkeypatch, kernels="triton")


def logits_of(
    mixes: Sequence[Mix], monkeypatch: pytest.MonkeyPatch, **config: Any
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


def test_interpret_other_adapters_need_no_other_graph() -> None:
    with running(tiny_model("llama"), ADAPTERS, kernels="triton", fuse=False) as engine:
        for i, mix in enumerate(MIXES[:3]):
            answer = ask(engine, request(str(i), mix, PROMPT, FEW))[0]
            assert tokens_of(answer) == wanted(mix, PROMPT, 3)
        graphs = engine._loop._runner._graphs
        assert graphs is not None
        assert set(graphs._programs) == {(1, ())}


def test_interpret_values_of_eight_bits_are_close(monkeypatch: pytest.MonkeyPatch) -> None:
    exact, _ = logits_of(MIXES[:2], monkeypatch)
    coarse, _ = logits_of(MIXES[:2], monkeypatch, int8_adapters=True)
    base, _ = logits_of([BASE] * 2, monkeypatch)
    for name, rows in exact.items():
        error = float((coarse[name][0] - rows[0]).norm())
        effect = float((base[name][0] - rows[0]).norm())
        assert 0 < error < 0.03 * effect
