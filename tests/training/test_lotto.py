"""LoTTO: supports that never overlap, parents that never change, and chains that are refused."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from gossamer.base.load import BaseFiles
from gossamer.store.chains import support_digest
from gossamer.store.delta import Delta, DeltaSet
from gossamer.store.format import digest
from gossamer.training.errors import AdapterError, ConfigError, DensityError, OverlapError
from gossamer.training.run import TrainResult
from tests.training.references import Task, assert_top_k, fine_tuned, masks_of, mean_loss
from tests.training.support import counting_examples, run_of, write_jsonl

TARGETS, LAYERS = "q,v,down", ("q_proj", "v_proj", "down_proj")
STEPS, RATE, BATCH = 4, 1e-3, 4
WORDS = (" three", " one two", " four", " nine ten")


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Four tasks of one form, each with its own answer."""
    folder = tmp_path_factory.mktemp("data")
    return [
        write_jsonl(
            folder / f"{number}.jsonl",
            [{**row, "completion": word} for row in counting_examples(12)],
        )
        for number, word in enumerate(WORDS)
    ]


def link(base: BaseFiles, data: Path, parents: Sequence[DeltaSet], **changed: Any) -> TrainResult:
    """One task of a chain; its parents are called a, b, c …"""
    adapters = dict(zip("abcdef", parents, strict=False))
    chosen = {"targets": TARGETS, **changed}
    if "mask_from" not in chosen:
        chosen = {"sparsity": 0.8, **chosen}
        if "mask" not in chosen:
            chosen = {"calibration_steps": STEPS, **chosen}
    settings = {
        "learning_rate": RATE, "batch_size": BATCH, "max_steps": 3, "value_dtype": "F32",
        "optimizer": "rmsprop", **chosen.pop("settings", {}),
    }  # fmt: skip
    if not parents:
        return run_of(base, data, "lota", chosen, **settings)
    chosen["parents"] = list(adapters)
    adapters |= chosen.pop("adapters", {})
    return run_of(base, data, "lotto", chosen, adapters=adapters, **settings)


@pytest.fixture(scope="module")
def chain(base: BaseFiles, tasks: list[Path]) -> list[TrainResult]:
    """Four tasks, each from the version before."""
    made: list[TrainResult] = []
    for data in tasks:
        made.append(link(base, data, [made[-1].delta_set] if made else []))
    return made


def support(delta_set: DeltaSet) -> set[tuple[str, int]]:
    return {
        (name, position)
        for name, delta in delta_set.deltas.items()
        for position in delta.elements()[0].tolist()
    }


def values(delta: Delta, positions: NDArray[np.int64]) -> NDArray[np.uint32]:
    """The bits at some positions, all of which must be there."""
    mine, carried = delta.elements()
    at = np.searchsorted(mine, positions).clip(max=len(mine) - 1)
    np.testing.assert_array_equal(mine[at], positions)
    return np.asarray(carried[at].view(np.uint32))


def assert_holds(child: DeltaSet, parent: DeltaSet) -> None:
    """Every entry of the parent, bit for bit."""
    for name, delta in parent.deltas.items():
        positions, carried = delta.elements()
        ours = values(child.deltas[name], positions)
        np.testing.assert_array_equal(ours, carried.view(np.uint32))


def test_a_chain_is_disjoint_self_contained_and_counts_what_is_free(
    chain: list[TrainResult], base: BaseFiles
) -> None:
    elements = 3 * (64 * 64 + 32 * 64 + 64 * 112)
    each, taken = round(0.2 * elements), set[tuple[str, int]]()
    for number, result in enumerate(chain):
        whole = support(result.delta_set)
        assert taken < whole
        assert len(whole) == result.delta_set.nnz == (number + 1) * each
        assert result.record["density"]["nnz"] == each
        if number:
            assert_holds(result.delta_set, chain[number - 1].delta_set)
            assert result.record["free_positions"] == {
                "of": elements,
                "before": elements - number * each,
                "after": elements - (number + 1) * each,
            }
        taken = whole
    child, parent = chain[1].delta_set, chain[0].delta_set
    for wrong in (moved_up(child, 1.0 + 2.0**-20), without(child, parent)):
        with pytest.raises(AssertionError):
            assert_holds(wrong, parent)


def moved_up(whole: DeltaSet, factor: float) -> DeltaSet:
    """Another value at every entry, by a few last bits."""
    deltas = {}
    for name, delta in whole.deltas.items():
        positions, carried = delta.elements()
        deltas[name] = Delta.element(delta.shape, positions, carried * np.float32(factor))
    return replace(whole, deltas=deltas)


def test_the_record_proves_what_the_parents_were(chain: list[TrainResult]) -> None:
    for parent, child in itertools.pairwise(chain):
        (named,) = child.record["chain"]
        assert named["digest"] == digest(parent.delta_set)
        assert named["nnz"] == parent.delta_set.nnz
        state = hashlib.sha256()
        for name in sorted(parent.delta_set.deltas):
            positions = parent.delta_set.deltas[name].elements()[0]
            state.update(f"{name}\0{len(positions)}\0".encode() + positions.astype("<i8").tobytes())
        assert named["support"] == f"sha256:{state.hexdigest()}" == support_digest(parent.delta_set)
    assert len({result.record["chain"][0]["support"] for result in chain[1:]}) == 3


def test_a_link_that_holds_its_parents_stands_for_them(
    chain: list[TrainResult], base: BaseFiles, tasks: list[Path]
) -> None:
    a, b, c = (result.delta_set for result in chain[:3])
    assert digest(link(base, tasks[2], [a, b]).delta_set) == digest(c)


def test_links_that_know_nothing_of_each_other_make_a_chain_if_they_are_disjoint(
    chain: list[TrainResult], base: BaseFiles, tasks: list[Path]
) -> None:
    a, b = chain[0].delta_set, chain[1].delta_set
    alone = without(b, a)
    result = link(base, tasks[2], [alone, a])
    assert digest(result.delta_set) == digest(chain[2].delta_set)
    assert [named["nnz"] for named in result.record["chain"]] == [alone.nnz, a.nnz]


def test_the_order_of_the_parents_is_of_no_importance(
    chain: list[TrainResult], base: BaseFiles, tasks: list[Path]
) -> None:
    a, b, c = (result.delta_set for result in chain[:3])
    turned = link(base, tasks[2], [b, a])
    assert digest(turned.delta_set) == digest(c)
    assert [named["digest"] for named in turned.record["chain"]] == [digest(b)]


def hollow(delta_set: DeltaSet, *, only: bool = False) -> DeltaSet:
    """With weights that have no entries: as a file may name them.

    Args:
        only: these alone.
    """
    shapes = {name: delta.shape for name, delta in delta_set.deltas.items()}
    shapes |= {name.replace("q_proj", "o_proj"): s for name, s in shapes.items() if "q_p" in name}
    none = np.array([], np.int64), np.array([], np.float32)
    empty = {name: Delta.element(shape, *none) for name, shape in shapes.items()}
    return replace(delta_set, deltas=empty if only else empty | dict(delta_set.deltas))


def test_weights_without_entries_are_as_if_they_were_not_there(
    chain: list[TrainResult], base: BaseFiles, tasks: list[Path]
) -> None:
    a, b = chain[0].delta_set, chain[1].delta_set
    nothing = hollow(a, only=True)
    for parents in ([a, nothing], [nothing, a], [nothing, hollow(a)], [hollow(a), nothing]):
        result = link(base, tasks[1], parents)
        assert digest(result.delta_set) == digest(b)
        assert len(result.record["chain"]) == 1
    alone = link(base, tasks[0], [nothing])
    assert digest(alone.delta_set) == digest(a)  # LoTA
    assert digest(link(base, tasks[2], [hollow(b), a]).delta_set) == digest(chain[2].delta_set)


def without(whole: DeltaSet, part: DeltaSet) -> DeltaSet:
    """The increment."""
    deltas = {}
    for name, delta in whole.deltas.items():
        positions, carried = delta.elements()
        keep = ~np.isin(positions, part.deltas[name].elements()[0])
        deltas[name] = Delta.element(delta.shape, positions[keep], carried[keep])
    return replace(whole, deltas=deltas)


@pytest.mark.parametrize("targets", [TARGETS, "v"])
def test_the_mask_is_calibrated_on_the_model_of_the_chain_outside_it(
    chain: list[TrainResult], base: BaseFiles, tasks: list[Path], targets: str
) -> None:
    """Also where the targets are fewer than the weights that the parents changed."""
    task = Task.of(base, tasks[1], BATCH, RATE)
    a = chain[0].delta_set
    every = list(task.weights(*LAYERS))
    names = [name for name in every if targets == TARGETS or "v_proj" in name]
    plain = task.weights(*LAYERS)
    adapted = {name: plain[name] + torch.from_numpy(a.deltas[name].dense()) for name in every}
    taken = masks_of(a, every, plain)
    free = {name: ~taken[name] for name in names}
    after = fine_tuned(task, names, STEPS, only=free, start=adapted)
    scores = {n: (after[n] - adapted[n]).abs().masked_fill(taken[n], -1.0) for n in names}
    result = link(base, tasks[1], [a], targets=targets)
    chosen = masks_of(result.delta_set, names, plain)
    new = {name: chosen[name] & free[name] for name in names}
    assert_top_k(new, scores, round(0.2 * sum(score.numel() for score in scores.values())))
    on_the_base = fine_tuned(task, names, STEPS, only=free)
    other = {n: (on_the_base[n] - plain[n]).abs().masked_fill(taken[n], -1.0) for n in names}
    with pytest.raises(AssertionError):
        assert_top_k(new, other, sum(int(mask.sum()) for mask in new.values()))
    assert_holds(result.delta_set, a)


def test_weight_decay_does_not_reach_the_parents(
    chain: list[TrainResult], base: BaseFiles, tasks: list[Path]
) -> None:
    settings = {"weight_decay": 5.0, "learning_rate": 1e-2}
    for optimizer in ("rmsprop", "adamw"):
        result = link(
            base, tasks[1], [chain[0].delta_set], settings={**settings, "optimizer": optimizer}
        )
        assert_holds(result.delta_set, chain[0].delta_set)


@pytest.mark.parametrize("extra", [{"block_size": 8}, {"mask": "random"}, {"scope": "tensor"}])
def test_other_selections_keep_out_of_the_chain_too(
    chain: list[TrainResult], base: BaseFiles, tasks: list[Path], extra: dict[str, Any]
) -> None:
    a = chain[0].delta_set if "block_size" not in extra else blocks(base, tasks[0])
    result = link(base, tasks[1], [a], **extra)
    assert_holds(result.delta_set, a)
    own = result.delta_set.nnz - a.nnz
    assert own == result.record["density"]["nnz"] > 0
    assert len(support(result.delta_set) - support(a)) == own


def blocks(base: BaseFiles, data: Path) -> DeltaSet:
    return link(base, data, [], block_size=8).delta_set


def test_a_borrowed_mask_keeps_out_of_the_chain_too(
    chain: list[TrainResult], base: BaseFiles, tasks: list[Path]
) -> None:
    """Of the whole of b, which lies in more weights than the targets, only b's own part is free."""
    a, b = chain[0].delta_set, chain[1].delta_set
    result = link(base, tasks[2], [a], targets="v", mask_from="lent", adapters={"lent": b})
    assert_holds(result.delta_set, a)
    gained = support(result.delta_set) - support(a)
    assert gained == {one for one in support(b) - support(a) if "v_proj" in one[0]}
    hollowed = link(
        base, tasks[2], [a], targets="v", mask_from="lent", adapters={"lent": hollow(b)}
    )
    assert digest(hollowed.delta_set) == digest(result.delta_set)
    for lent in (a, hollow(a, only=True)):
        with pytest.raises(AdapterError, match="none of its entries"):
            link(base, tasks[2], [a], mask_from="lent", adapters={"lent": lent})


def test_a_parent_of_another_base_is_refused(
    chain: list[TrainResult], base: BaseFiles, tasks: list[Path]
) -> None:
    other = replace(chain[0].delta_set, base_fingerprint="0" * 64)
    with pytest.raises(AdapterError, match="it is for the base") as caught:
        link(base, tasks[1], [chain[0].delta_set, other])
    assert (caught.value.reference, caught.value.field) == ("b", "parents.1")
    name, delta = next(iter(chain[0].delta_set.deltas.items()))
    reshaped = Delta.element((delta.shape[0] + 1, delta.shape[1]), *delta.elements())
    with pytest.raises(AdapterError, match="the base has no"):
        link(base, tasks[1], [replace(chain[0].delta_set, deltas={name: reshaped})])


def test_overlapping_parents_are_refused(
    chain: list[TrainResult], base: BaseFiles, tasks: list[Path]
) -> None:
    a = chain[0].delta_set
    other = link(base, tasks[1], []).delta_set
    with pytest.raises(OverlapError) as caught:
        link(base, tasks[2], [a, other])
    error = caught.value
    shared = {p for n, p in support(a) & support(other) if n == error.weight}
    assert (error.reference, error.other, error.shared) == ("b", "a", len(shared))
    assert error.field == "parents.1"
    assert "'b' of parents.1" in str(error)
    assert shared


def test_a_chain_that_has_no_room_left_is_refused(base: BaseFiles, tasks: list[Path]) -> None:
    settings = {"max_steps": 1}
    a = link(base, tasks[0], [], sparsity=0.4, calibration_steps=1, settings=settings).delta_set
    b = link(base, tasks[1], [a], sparsity=0.6, calibration_steps=1, settings=settings)
    assert b.record["free_positions"]["after"] == 0
    with pytest.raises(DensityError) as caught:
        link(base, tasks[2], [b.delta_set], sparsity=0.9)
    assert caught.value.available == 0
    assert caught.value.remedy == "Give more targets"
    assert caught.value.wanted == round(0.1 * 3 * (64 * 64 + 32 * 64 + 64 * 112))
    with pytest.raises(DensityError) as caught:  # some room, and not enough
        link(base, tasks[2], [a], sparsity=0.3)
    possible = caught.value.smallest
    full = link(base, tasks[2], [a], sparsity=possible, calibration_steps=1, settings=settings)
    assert full.record["free_positions"]["after"] == 0


def test_a_chain_begins_with_its_parents_alone(
    chain: list[TrainResult], base: BaseFiles, tasks: list[Path]
) -> None:
    with pytest.raises(ConfigError, match=r"parameters\.init_from"):
        link(base, tasks[1], [chain[0].delta_set], init_from="a")


def test_what_the_model_computes_is_what_the_adapter_says(
    chain: list[TrainResult], base: BaseFiles, tasks: list[Path]
) -> None:
    """The last evaluation of the run, on the base with the adapter added densely."""
    result = link(base, tasks[1], [chain[0].delta_set], settings={"eval_data": tasks[1]})
    task = Task.of(base, tasks[1], BATCH, RATE)
    patched: dict[str, Tensor] = {
        name: task.model.get_parameter(name) + torch.from_numpy(delta.dense())
        for name, delta in result.delta_set.deltas.items()
    }
    assert result.evaluations[-1].loss == pytest.approx(loss_of(task, patched), rel=1e-4)
    before = {
        name: task.model.get_parameter(name) + torch.from_numpy(delta.dense())
        for name, delta in chain[0].delta_set.deltas.items()
    }
    assert result.evaluations[0].loss == pytest.approx(loss_of(task, before), rel=1e-4)


def loss_of(task: Task, weights: dict[str, Tensor]) -> float:
    with torch.no_grad():
        return float(mean_loss(task.model, task.examples, weights))
