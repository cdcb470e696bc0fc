"""The exact selection against a plain sort, and tiles against slices."""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from gossamer.training.errors import NotANumberError
from gossamer.training.selecting import largest, tile_entries, tile_sums

SPECIAL = (0.0, -0.0, 1.0, -1.0, 2.0, math.inf, -math.inf, 1e-45, -1e-45, 3.4e38)
#: What a byte stands for: few values, so that most selections end inside a run of equal scores, and
#: some neighbours in the last bits.
SCORES = np.array([*SPECIAL, *(1.0 + i * 2.0**-23 for i in range(-3, 3))], np.float32)


@st.composite
def problems(draw: st.DrawFn) -> tuple[dict[str, Tensor], dict[str, Tensor], int]:
    """Weights with their scores, masks for some of them, and a possible k."""
    scores, allowed = {}, {}
    for name in draw(st.permutations("abc"))[: draw(st.integers(1, 3))]:
        shape = draw(st.integers(1, 7)), draw(st.integers(1, 7))
        size = shape[0] * shape[1]
        drawn = np.frombuffer(draw(st.binary(min_size=size, max_size=size)), np.uint8)
        scores[name] = torch.from_numpy(SCORES[drawn % len(SCORES)]).view(shape)
        if draw(st.booleans()):
            allowed[name] = torch.from_numpy(drawn // len(SCORES) % 4 > 0).view(shape)
    free = sum(
        int(allowed[name].sum()) if name in allowed else score.numel()
        for name, score in scores.items()
    )
    if not free:
        allowed.clear()
        free = sum(score.numel() for score in scores.values())
    return scores, allowed, draw(st.integers(1, free))


def by_sorting(
    scores: Mapping[str, Tensor], allowed: Mapping[str, Tensor], k: int
) -> dict[str, list[int]]:
    """What `largest` promises, in one sort: by score, then by weight, then by position."""
    rows = [
        (-value, number, position)
        for number, (name, score) in enumerate(scores.items())
        for position, value in enumerate(score.reshape(-1).tolist())
        if name not in allowed or allowed[name].reshape(-1)[position]
    ]
    names, found = list(scores), dict[str, list[int]]()
    for _, number, position in sorted(rows)[:k]:
        found.setdefault(names[number], []).append(position)
    return {name: sorted(found[name]) for name in scores if name in found}


def check(scores: Mapping[str, Tensor], allowed: Mapping[str, Tensor], k: int) -> None:
    chosen = largest(scores, k, allowed)
    found = {name: where.tolist() for name, where in chosen.positions.items()}
    assert found == by_sorting(scores, allowed, k)
    assert sum(map(len, found.values())) == k
    assert list(found) == [name for name in scores if name in found]
    assert all(where.dtype == torch.int64 for where in chosen.positions.values())


@settings(max_examples=60, deadline=None)
@given(problems())
def test_the_largest_are_those_of_a_plain_sort(
    problem: tuple[dict[str, Tensor], dict[str, Tensor], int],
) -> None:
    check(*problem)


def test_a_corrupted_selection_is_rejected(monkeypatch: pytest.MonkeyPatch) -> None:
    scores = {"a": torch.tensor([[3.0, 1.0], [2.0, 2.0]]), "b": torch.tensor([[2.0, 5.0]])}
    check(scores, {}, 3)
    real = largest(scores, 3)
    assert {n: w.tolist() for n, w in real.positions.items()} == {"a": [0, 2], "b": [1]}
    for wrong in ({"a": [0, 3], "b": [1]}, {"a": [0, 2, 3], "b": [1]}, {"a": [0], "b": [0, 1]}):
        positions = {name: torch.tensor(where) for name, where in wrong.items()}
        monkeypatch.setattr(f"{__name__}.largest", lambda *_, p=positions: type(real)(p, real.tied))
        with pytest.raises(AssertionError):
            check(scores, {}, 3)


def test_exactly_k_are_chosen_even_when_almost_nothing_changed() -> None:
    """A threshold would be 0 here and keep everything."""
    score = torch.zeros(30, 40)
    score[7, 3], score[29, 39] = 0.5, 0.25
    chosen = largest({"w": score}, 100)
    assert chosen.positions["w"].tolist() == [*range(98), 7 * 40 + 3, 30 * 40 - 1]
    assert chosen.tied == 98
    assert largest({"w": score}, 2).tied == 0
    assert largest({"w": score}, 1200).tied == 0  # all of them: nothing was left to chance


def test_zero_has_no_sign() -> None:
    score = torch.tensor([-0.0, 0.0, -0.0, -1.0])
    assert largest({"w": score}, 2).positions["w"].tolist() == [0, 1]


def test_many_scores_of_one_bucket_are_told_apart() -> None:
    """Scores whose upper 16 bits are the same: the second pass decides."""
    bits = torch.arange(5000, dtype=torch.int32) + 0x3F800000
    score = bits.view(torch.float32)[torch.randperm(5000, generator=torch.Generator())]
    check({"w": score[:2000].view(50, 40), "v": score[2000:].view(50, 60)}, {}, 1234)
    check({"w": -score[:2000].view(50, 40), "v": score[2000:].view(50, 60)}, {}, 4321)


@pytest.mark.parametrize("k", [0, -1, 5])
def test_a_number_that_is_not_there_is_refused(k: int) -> None:
    allowed = {"w": torch.tensor([True, True, True, True, False])}
    with pytest.raises(ValueError, match=f"{k} positions of 4"):
        largest({"w": torch.ones(5)}, k, allowed)


def test_a_score_that_is_no_number_is_refused() -> None:
    with pytest.raises(NotANumberError, match="not a number"):
        largest({"v": torch.ones(3), "w": torch.tensor([1.0, math.nan])}, 1)


@pytest.mark.parametrize("shape", [(16, 16), (24, 8), (5, 40), (17, 9), (8, 33), (1, 3)])
@pytest.mark.parametrize("side", [8, 16])
def test_tiles_are_those_of_the_matrix(shape: tuple[int, int], side: int) -> None:
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(side), dtype=torch.float64)
    sums = tile_sums(weight, side)
    down, across = math.ceil(shape[0] / side), math.ceil(shape[1] / side)
    assert sums.shape == (down, across)
    number = torch.arange(shape[0] * shape[1]).view(shape)
    for i in range(down):
        for j in range(across):
            here = np.s_[i * side : (i + 1) * side, j * side : (j + 1) * side]
            torch.testing.assert_close(sums[i, j], weight[here].sum())
            entries = tile_entries(torch.tensor([i * across + j]), shape, side)
            assert entries.tolist() == sorted(number[here].reshape(-1).tolist())
    every = tile_entries(torch.arange(down * across), shape, side)
    assert every.tolist() == list(range(shape[0] * shape[1]))


def test_tiles_of_a_flattened_weight_are_not_tiles() -> None:
    """The mistake to avoid: runs of B² consecutive entries, which are no squares if B < columns."""
    weight = torch.arange(32 * 8.0).view(32, 8)
    runs = weight.reshape(-1, 64).sum(1)
    assert torch.equal(tile_sums(weight, 8).reshape(-1), runs)  # 8 columns: they coincide
    weight = torch.arange(8 * 32.0).view(8, 32)
    assert not torch.equal(tile_sums(weight, 8).reshape(-1), weight.reshape(-1, 64).sum(1))
