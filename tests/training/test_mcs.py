"""MCS against algorithm 1 of its paper, written out with a dense Ŵ and a mask."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from gossamer.base.load import BaseFiles
from gossamer.training.errors import DensityError, NotSelectedError
from gossamer.training.run import TrainResult
from tests.training.references import (
    Task,
    Weights,
    algorithm_1,
    assert_top_k,
    assert_values,
    block_mask,
    block_sums,
    masked_adamw,
    masks_of,
    with_the_worst,
)
from tests.training.support import counting_examples, run_of, tiny_base, write_jsonl

RATE, BATCH, KEEP = 3e-3, 4, 0.1
#: 12 examples, 4 at a time: an epoch is 3 steps
EPOCH = 3
LAYERS = ("q_proj", "k_proj", "v_proj")


@pytest.fixture(scope="module")
def task(base: BaseFiles, data: Path) -> Task:
    return Task.of(base, data, BATCH, RATE)


def mcs(base: BaseFiles, data: Path, steps: int, **parameters: Any) -> TrainResult:
    chosen = {"keep_ratio": KEEP, "warmup_steps": 1, **parameters}
    return run_of(
        base, data, "mcs", chosen, value_dtype="F32", learning_rate=RATE, batch_size=BATCH,
        max_steps=steps,
    )  # fmt: skip


def scored(kind: str, sign: str, values: Tensor, gradient: Tensor) -> Tensor:
    """Equations 1 and 2, and table 2's others."""
    if kind == "mcs":
        product = values * gradient
        return {"+": product, "-": -product, "abs": product.abs()}[sign]
    return {
        "snip": (values * gradient).abs(),
        "gradient": gradient.abs(),
        "magnitude": values.abs(),
    }[kind]


def top_of(score: Tensor, k: int) -> Tensor:
    mask = torch.zeros(score.numel(), dtype=torch.bool)
    mask[score.reshape(-1).argsort(descending=True, stable=True)[:k]] = True
    return mask.view(score.shape)


def kept(score: Tensor) -> int:
    return round(KEEP * score.numel())


@pytest.mark.parametrize(
    ("kind", "sign"),
    [("mcs", "+"), ("mcs", "-"), ("mcs", "abs"), ("snip", ""), ("gradient", ""),
     ("magnitude", "")],
)  # fmt: skip
def test_the_mask_is_algorithm_1s(
    base: BaseFiles, data: Path, task: Task, kind: str, sign: str
) -> None:
    """After the warm-up, at every second step of two epochs, and then no more."""
    names = list(task.weights(*LAYERS))
    # Adam's first step has one size everywhere: magnitudes want some more.
    selections, steps = (3, 4, 6) if kind == "magnitude" else (1, 2, 4, 6), 2 * EPOCH
    scores: Weights = {}

    def select(_: int, values: Weights, gradients: Weights, masks: Weights) -> Weights:
        scores.update({n: scored(kind, sign, values[n], gradients[n]) for n in names})
        return {name: top_of(scores[name], kept(scores[name])) for name in names}

    algorithm_1(task, names, select, selections, steps, whole=8)
    result = mcs(
        base,
        data,
        8,
        score=kind,
        **({"sign": sign} if sign else {}),
        period=2,
        selection_epochs=2.0,
        warmup_steps=selections[0],
    )
    assert result.record["selection"]["times"] == len(selections)
    assert result.record["phases"] == {"select": steps, "train": 2}
    chosen = masks_of(result.delta_set, names, task.weights(*LAYERS))
    for name in names:
        k, close = kept(scores[name]), 2e-4 if kind == "magnitude" else 1e-3
        assert_top_k({name: chosen[name]}, {name: scores[name]}, k, tolerance=close)
        wrong = with_the_worst({name: chosen[name]}, {name: scores[name]})
        with pytest.raises(AssertionError, match="not among the largest"):
            assert_top_k(wrong, {name: scores[name]}, k, tolerance=close)


def test_the_values_are_what_masked_training_gives(base: BaseFiles, data: Path, task: Task) -> None:
    """Ŵ · M after the epoch of selections, then the masked values alone, on one schedule."""
    names = list(task.weights(*LAYERS))
    result = mcs(base, data, 5, period=100)
    chosen = masks_of(result.delta_set, names, task.weights(*LAYERS))
    values, _, _ = algorithm_1(task, names, lambda *_: chosen, (1,), EPOCH, whole=5)
    expected = masked_adamw(task, chosen, values, EPOCH, 2, whole=5)
    assert_values(result.delta_set, expected, tolerance=1e-2)
    other = masked_adamw(task, chosen, values, 0, 2, whole=2)
    with pytest.raises(AssertionError):  # a schedule of its own for each phase
        assert_values(result.delta_set, other, tolerance=1e-2)
    rewound = replace(task, examples=task.examples[::-1])
    others = masked_adamw(rewound, chosen, values, EPOCH, 2, whole=5)
    with pytest.raises(AssertionError):  # other examples
        assert_values(result.delta_set, others, tolerance=1e-2)


def test_the_first_selection_comes_after_a_warm_up(base: BaseFiles, data: Path, task: Task) -> None:
    """While Ŵ = 0 every score is 0; also where the learning rate's own warm-up is not over yet."""
    names = list(task.weights(*LAYERS))
    result = run_of(
        base, data, "mcs", {"warmup_steps": 1}, warmup=0.5, learning_rate=RATE, batch_size=BATCH,
        max_steps=4,
    )  # fmt: skip
    for mask in masks_of(result.delta_set, names, task.weights(*LAYERS)).values():
        first = mask.reshape(-1)[: int(mask.sum())]
        assert first.float().mean() < 0.5  # not just the first k: something was there to rank
    with pytest.raises(NotSelectedError) as caught:
        mcs(base, data, 2, warmup_steps=3)
    assert (caught.value.steps, caught.value.needed) == (2, 3)


@pytest.mark.parametrize(
    ("examples", "period", "times"), [(12, 100, 1), (40, 2, 6), (40, 3, 4), (40, 10, 2)]
)
def test_selections_are_counted(
    base: BaseFiles, tmp_path: Path, examples: int, period: int, times: int
) -> None:
    """The default warm-up is a tenth of the epoch; then every period, to the epoch's end."""
    file = write_jsonl(tmp_path / "data.jsonl", counting_examples(examples))
    result = run_of(
        base, file, "mcs", {"period": period, "targets": "k"}, batch_size=4, max_steps=11
    )
    warmup, epoch = math.ceil(examples / 4 / 10), examples // 4
    expected = {warmup, *(step for step in range(warmup + 1, epoch + 1) if step % period == 0)}
    assert result.record["selection"]["times"] == times == len(expected)


@pytest.mark.parametrize("side", [8, 32])
def test_tiles_are_chosen_by_their_summed_scores(
    base: BaseFiles, data: Path, task: Task, side: int
) -> None:
    """On [112, 64] and [64, 112] weights: no squares, and with tiles of 32 ragged ones."""
    layers = ("up_proj", "down_proj")
    names = list(task.weights(*layers))
    scores: Weights = {}

    def select(_: int, values: Weights, gradients: Weights, masks: Weights) -> Weights:
        for n in names:
            scores[n] = block_sums(values[n] * gradients[n], side)
        return masks

    algorithm_1(task, names, select, (1,), 1, whole=1)
    result = mcs(
        base, data, 1, targets="up,down", block_size=side, sign="+", selection_epochs=1 / EPOCH
    )
    masks = masks_of(result.delta_set, names, task.weights(*layers))
    for name in names:
        rows, columns = task.weights(*layers)[name].shape
        wanted = round(KEEP * rows * columns / side**2)  # equation 3
        tiles = {name: block_mask(masks[name], side)}
        score = {name: scores[name]}
        assert_top_k(tiles, score, wanted)
        with pytest.raises(AssertionError, match="not among the largest"):
            assert_top_k(with_the_worst(tiles, score), score, wanted)
    assert {d.block_size for d in result.delta_set.deltas.values()} == {side}


@pytest.mark.parametrize("side", [1, 8])
def test_grow_drop_replaces_what_changed_least(
    base: BaseFiles, data: Path, task: Task, side: int
) -> None:
    """A fifth of the mask goes at the second selection: what has moved least since the first. What
    comes instead has the largest gradients elsewhere."""
    names = list(task.weights("q_proj"))
    before: list[Weights] = []
    masks: list[Weights] = []
    scores: list[Weights] = []

    def units(score: Tensor) -> Tensor:
        return score if side == 1 else block_sums(score, side)

    def entries(tiles: Tensor) -> Tensor:
        return tiles if side == 1 else tiles.repeat_interleave(side, 0).repeat_interleave(side, 1)

    def select(number: int, values: Weights, gradients: Weights, _: Weights) -> Weights:
        grown = {name: units(gradients[name].abs()) for name in names}
        chosen = {name: top_of(grown[name], kept(grown[name])) for name in names}
        if number:
            for name in names:
                k, inside = kept(grown[name]), masks[-1][name]
                moved = units((values[name] - before[-1][name]).abs())
                stay = top_of(moved.masked_fill(~inside, -1), round(0.8 * k))
                grow = top_of(grown[name].masked_fill(inside, -1), k - round(0.8 * k))
                chosen[name] = stay | grow
                assert int((chosen[name] & inside).sum()) == round(0.8 * k)
        before.append(values)
        masks.append(chosen)
        scores.append(grown)
        return {name: entries(chosen[name]) for name in names}

    algorithm_1(task, names, select, (1, 3), EPOCH, whole=EPOCH)
    result = mcs(base, data, EPOCH, targets="q", score="grow_drop", period=3, block_size=side)
    found = masks_of(result.delta_set, names, task.weights("q_proj"))
    for name in names:
        ours = block_mask(found[name], side) if side > 1 else found[name]
        assert int(ours.sum()) == int(masks[-1][name].sum())
        differing = int((ours != masks[-1][name]).sum())
        assert differing <= (4 if side == 1 else 0)  # near ties at one of three borders
        assert not torch.equal(ours, masks[0][name])


def test_layers_below_the_threshold_are_left_out(base: BaseFiles, data: Path, task: Task) -> None:
    """Equations 5 and 6: the threshold is the k-th largest of all scores together."""
    names = list(task.weights(*LAYERS))
    scores: Weights = {}

    def select(_: int, values: Weights, gradients: Weights, masks: Weights) -> Weights:
        scores.update({n: block_sums(values[n] * gradients[n], 16) for n in names})
        return masks

    algorithm_1(task, names, select, (1,), 1, whole=1)
    ranked = torch.cat([score.reshape(-1) for score in scores.values()]).sort(descending=True)
    result = mcs(
        base, data, 1, keep_ratio=0.13, block_size=16, layer_drop=True, sign="+",
        selection_epochs=1 / EPOCH,
    )  # fmt: skip
    counts = {name: round(0.13 * score.numel()) for name, score in scores.items()}
    threshold = float(ranked.values[sum(counts.values()) - 1])
    dropped = sorted(name for name, score in scores.items() if float(score.max()) < threshold)
    assert 0 < len(dropped) < len(names)
    assert sorted(result.record["selection"]["dropped_weights"]) == dropped
    assert sorted(result.delta_set.deltas) == sorted(set(names) - set(dropped))
    for name, delta in result.delta_set.deltas.items():
        assert delta.nnz == counts[name] * 256


def test_a_dropped_layer_may_come_back_when_a_part_of_the_mask_is_replaced(
    base: BaseFiles, data: Path
) -> None:
    result = mcs(
        base, data, 6, score="grow_drop", keep_ratio=0.07, block_size=16, layer_drop=True, period=1,
        selection_epochs=2.0,
    )  # fmt: skip
    assert result.record["selection"]["times"] == 6
    assert 0 < result.delta_set.nnz == result.record["density"]["nnz"]


def test_scores_are_of_all_examples_of_an_accumulated_step(base: BaseFiles, data: Path) -> None:
    def run(batch_size: int, accumulated: int) -> dict[str, set[int]]:
        result = run_of(
            base, data, "mcs", {"targets": "q", "score": "gradient", "keep_ratio": KEEP},
            batch_size=batch_size, gradient_accumulation=accumulated, max_steps=1,
        )  # fmt: skip
        return {n: set(d.positions.tolist()) for n, d in result.delta_set.deltas.items()}

    whole, parts = run(12, 1), run(3, 4)
    for name, positions in whole.items():
        assert len(positions ^ parts[name]) <= 4
    one = run(3, 1)  # of a quarter of them, as the last part of the step would be
    assert all(len(positions ^ one[name]) > 40 for name, positions in whole.items())


def test_a_keep_ratio_that_keeps_nothing_is_refused(base: BaseFiles, data: Path) -> None:
    with pytest.raises(DensityError, match="0 positions") as caught:
        mcs(base, data, 3, keep_ratio=0.02, block_size=16, targets="q")
    assert (caught.value.field, caught.value.given) == ("keep_ratio", 0.02)
    assert "density" not in str(caught.value)
    assert caught.value.available == 64 * 64
    mcs(base, data, 1, keep_ratio=caught.value.smallest, block_size=16, targets="q")


def test_no_bias_is_trained(tiny_dir: Callable[..., Path], data: Path) -> None:
    """On a model whose q, k and v have biases; the paper's code trains a hidden one."""
    base = tiny_base(tiny_dir("qwen2"))
    result = run_of(base, data, "mcs", {}, max_steps=1)
    assert all(name.endswith("_proj.weight") for name in result.delta_set.deltas)
    assert {name.split(".")[-2] for name in result.delta_set.deltas} == set(LAYERS)
