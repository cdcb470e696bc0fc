"""Drawing tokens: every rule against a plain computation, and independence of the neighbours."""

import math
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from gossamer.engine.errors import InvalidRequest, StepFailed
from gossamer.engine.messages import Sampling
from gossamer.engine.sampler import Chooser, Drawn, sample, score, uniform

VOCAB = 50
EOS = 2


def chooser(sampling: Sampling, index: int = 0, **more: object) -> Chooser:
    seed = sampling.seed if sampling.seed is not None else 1
    return Chooser(sampling, index, seed, frozenset({EOS}), (5, 6, 7), VOCAB, **more)  # type: ignore[arg-type]


def logits(seed: int = 0) -> torch.Tensor:
    return torch.randn(VOCAB, generator=torch.Generator().manual_seed(seed)) * 2


def draw(sampling: Sampling, row: torch.Tensor, position: int = 0) -> int:
    got = sample(row[None], [chooser(sampling)], [position])[0]
    assert isinstance(got, Drawn)
    return got.token


def frequencies(sampling: Sampling, row: torch.Tensor, count: int = 4000) -> torch.Tensor:
    drawn = Counter(draw(replace(sampling, seed=seed), row) for seed in range(count))
    return torch.tensor([drawn[token] / count for token in range(VOCAB)])


def test_uniform_is_the_same_everywhere_and_even() -> None:
    assert uniform(1, 2, 3) == 0.7069603535111167
    values = np.array([uniform(7, 0, position) for position in range(20_000)])
    assert values.min() >= 0
    assert values.max() < 1
    histogram, _ = np.histogram(values, bins=20, range=(0, 1))
    assert abs(histogram - 1000).max() < 150


def test_greedy_takes_the_largest() -> None:
    row = logits()
    assert draw(Sampling(temperature=0), row) == int(row.argmax())
    assert draw(Sampling(temperature=0, logprobs=0), row) == int(row.argmax())


@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(temperature=1.0),
        Sampling(temperature=0.5),
        Sampling(temperature=1.0, top_k=4),
        Sampling(temperature=1.0, top_p=0.7),
        Sampling(temperature=1.0, min_p=0.3),
        Sampling(temperature=1.5, top_k=10, top_p=0.8),
    ],
    ids=str,
)
def test_the_frequencies_are_those_of_the_definition(sampling: Sampling) -> None:
    row = logits()
    probs = torch.softmax(row / sampling.temperature, -1)
    if sampling.min_p:
        probs = torch.where(probs >= sampling.min_p * probs.max(), probs, 0)
    order = probs.argsort(descending=True)
    if sampling.top_k:
        probs[order[sampling.top_k :]] = 0
    if sampling.top_p < 1:
        probs = probs / probs.sum()
        before = probs[order].cumsum(-1) - probs[order]
        probs[order[before >= sampling.top_p]] = 0
    probs = probs / probs.sum()
    got = frequencies(sampling, row)
    assert not got[probs == 0].any()
    assert 0.5 * float((got - probs).abs().sum()) < 0.03
    wrong = probs.roll(1)  # shown to be sensitive: shifted by one token the distance is large
    assert 0.5 * float((got - wrong).abs().sum()) > 0.2


def test_a_draw_depends_on_seed_choice_and_position_alone() -> None:
    row, other = logits(0), logits(1)
    rules = Sampling(temperature=1.0, seed=11)
    alone = [draw(rules, row, position) for position in range(20)]
    together = []
    for position in range(20):
        rows = [
            chooser(Sampling(temperature=1.0, seed=3)),
            chooser(rules),
            chooser(Sampling(temperature=0)),
        ]
        got = sample(torch.stack([other, row, other]), rows, [0, position, 9])[1]
        assert isinstance(got, Drawn)
        together.append(got.token)
    assert together == alone
    assert len(set(alone)) > 3
    second = sample(row[None], [chooser(rules, index=1)], [0])[0]
    assert isinstance(second, Drawn)
    assert [draw(replace(rules, seed=12), row, position) for position in range(20)] != alone


def test_penalties_follow_their_definitions() -> None:
    row = torch.zeros(VOCAB)
    row[5], row[9], row[10] = 2.0, 1.9, -1.0
    rules = chooser(Sampling(temperature=0, repetition_penalty=1.2))
    rules.accept(10)
    work = row.clone()
    rules._penalise(work)
    assert work[5] == pytest.approx(2.0 / 1.2)  # in the prompt
    assert work[10] == pytest.approx(-1.2)  # drawn before
    assert work[9] == pytest.approx(1.9)
    counted = chooser(Sampling(temperature=0, presence_penalty=0.5, frequency_penalty=0.25))
    for token in (9, 9, 10):
        counted.accept(token)
    work = row.clone()
    counted._penalise(work)
    assert work[9] == pytest.approx(1.9 - 0.5 - 2 * 0.25)
    assert work[10] == pytest.approx(-1.0 - 0.5 - 0.25)
    assert work[5] == 2.0  # only the prompt has it


def test_bias_allowed_tokens_and_min_tokens() -> None:
    row = torch.zeros(VOCAB)
    row[EOS] = 10.0
    assert draw(Sampling(temperature=0, min_tokens=3), row, 2) != EOS
    assert draw(Sampling(temperature=0, min_tokens=3), row, 3) == EOS
    assert draw(Sampling(temperature=0, logit_bias={7: 11.0}), row) == 7
    assert draw(Sampling(temperature=0, allowed_token_ids=(4,)), row) == 4
    assert draw(Sampling(temperature=1.0, allowed_token_ids=(4,)), row) == 4


@pytest.mark.parametrize(
    "rules", [Sampling(temperature=1e-40), Sampling(top_p=1e-46), Sampling(top_p=0.0)], ids=str
)
def test_extreme_rules_mean_greedy(rules: Sampling) -> None:
    row = logits()
    for seed in range(10):
        assert draw(replace(rules, seed=seed), row) == int(row.argmax())


def test_what_a_constraint_raises_is_its_own_rows_error() -> None:
    class Broken(Only):
        def fill_mask(self, allowed: NDArray[np.bool_]) -> None:
            raise RuntimeError("broken")

    row = logits()
    rows = [chooser(Sampling(), constraint=Broken([])), chooser(Sampling(temperature=0))]
    broken, sound = sample(torch.stack([row, row]), rows, [0, 0])
    assert isinstance(broken, StepFailed)
    assert isinstance(sound, Drawn)


def test_logprobs_are_those_of_the_raw_logits() -> None:
    row = logits()
    wanted = torch.log_softmax(row.double(), -1)
    rules = Sampling(temperature=0, logprobs=3, logit_bias={7: 100.0})
    got = sample(row[None], [chooser(rules)], [0])[0]
    assert isinstance(got, Drawn)
    assert got.logprob is not None
    assert got.token == 7
    assert got.logprob.logprob == pytest.approx(float(wanted[7]), abs=1e-5)
    best = wanted.topk(3)
    assert [token for token, _ in got.logprob.top] == best.indices.tolist()
    assert [value for _, value in got.logprob.top] == pytest.approx(best.values.tolist(), abs=1e-5)
    assert math.exp(score(row, 0, 0).logprob) == pytest.approx(float(wanted[0].exp()), rel=1e-5)


class Only:
    """A constraint that allows the given tokens."""

    def __init__(self, tokens: list[int]) -> None:
        self.tokens = tokens

    def fill_mask(self, allowed: NDArray[np.bool_]) -> None:
        allowed[self.tokens] = True

    def accept(self, token: int) -> None:
        raise AssertionError(token)

    def is_finished(self) -> bool:
        return False


def test_a_constraint_is_obeyed_and_a_contradiction_is_that_rows_error_only() -> None:
    row = logits()
    rules = Sampling(temperature=1.0)
    impossible = replace(rules, allowed_token_ids=(1,))
    got = sample(
        torch.stack([row, row, row]),
        [
            chooser(rules, constraint=Only([3])),
            chooser(impossible, constraint=Only([3])),
            chooser(Sampling(temperature=0)),
        ],
        [0, 0, 0],
    )
    assert isinstance(got[0], Drawn)
    assert got[0].token == 3
    assert isinstance(got[1], InvalidRequest)
    assert isinstance(got[2], Drawn)
