"""Rows drawn together, as on a device, against each drawn by itself."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from gossamer.engine import drawing
from gossamer.engine.drawing import Rules, draw
from gossamer.engine.messages import Sampling
from gossamer.engine.sampler import Chooser

VOCAB = 3000


def sampling(generator: np.random.Generator) -> Sampling:
    return Sampling(
        temperature=float(generator.choice([0.3, 1.0, 1.7])),
        top_k=int(generator.choice([-1, 0, 1, 7, 400])),
        top_p=float(generator.choice([1.0, 0.999, 0.9, 0.5, 1e-6])),
        min_p=float(generator.choice([0.0, 0.0, 0.05, 0.3])),
    )


def choosers(count: int, generator: np.random.Generator) -> list[Chooser]:
    seeds = [int(seed) for seed in generator.integers(1 << 60, size=count)]
    return [
        Chooser(sampling(generator), i % 3, seed, frozenset(), (), VOCAB)
        for i, seed in enumerate(seeds)
    ]


def rules_of(chooser: Chooser, drawn: int) -> Rules:
    rules = chooser.rules(drawn)
    assert rules is not None
    return rules


@pytest.mark.parametrize("scale", [0.02, 1.0, 4.0], ids=["flat", "plain", "peaked"])
def test_together_is_as_one_by_one(scale: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nearly flat rows have a nucleus wider than the candidates: those are left for later."""
    monkeypatch.setattr(drawing, "NUCLEUS_GUESS", 256)
    generator = np.random.default_rng(1)
    logits = torch.randn(96, VOCAB, generator=torch.Generator().manual_seed(3)) * scale
    rows = choosers(96, generator)
    found = draw(logits, [rules_of(c, i) for i, c in enumerate(rows)])
    alone = [c.choose(logits[i], i)[0] for i, c in enumerate(rows)]
    left = sum(token is None for token in found)
    for i, (token, right) in enumerate(zip(found, alone, strict=True)):
        assert token is None or token == right, (i, rows[i].sampling)
    assert left > 5 if scale < 1 else left < 48
    assert len(set(alone)) > 20
    others = [draw(logits[i : i + 1], [rules_of(c, i)])[0] for i, c in enumerate(rows)]
    for together, by_itself in zip(found, others, strict=True):
        assert None in (together, by_itself) or together == by_itself
    shifted = draw(logits, [rules_of(c, i + 1) for i, c in enumerate(rows)])
    assert shifted != found, "another position is another draw"


def test_who_has_other_rules_is_drawn_by_itself() -> None:
    def has_rules(**given: object) -> bool:
        chosen = Sampling(**{"temperature": 1.0, **given})  # type: ignore[arg-type]
        chooser = Chooser(chosen, 0, 1, frozenset({2}), (5,), VOCAB)
        return chooser.rules(0) is not None

    assert has_rules()
    assert has_rules(top_k=3, top_p=0.9, min_p=0.1)
    for other in (
        {"temperature": 0.0}, {"logprobs": 0}, {"presence_penalty": 0.1}, {"min_tokens": 1},
        {"repetition_penalty": 1.1}, {"logit_bias": {3: 1.0}}, {"allowed_token_ids": (1, 2)},
    ):  # fmt: skip
        assert not has_rules(**other)


@pytest.mark.gpu
def test_a_card_draws_what_the_cpu_draws() -> None:
    generator = np.random.default_rng(2)
    logits = torch.randn(64, VOCAB, generator=torch.Generator().manual_seed(5))
    rules = [rules_of(c, i) for i, c in enumerate(choosers(64, generator))]
    on_card, here = draw(logits.cuda(), rules), draw(logits, rules)
    same = sum(a == b for a, b in zip(on_card, here, strict=True))
    assert same >= 62, "but for a draw that lies on the border of two tokens"
