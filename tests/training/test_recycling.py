"""Beginning with an adapter or a mix: inherited positions, selected ones, and full fine-tuning."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from gossamer.base.load import BaseFiles
from gossamer.jobs.errors import ParameterError
from gossamer.jobs.methods import DECLARATIONS
from gossamer.store.delta import Delta, DeltaSet
from gossamer.store.format import digest, open_validated
from gossamer.training.errors import AdapterError
from gossamer.training.run import TrainResult
from tests.training.references import Task, mean_loss
from tests.training.support import run_of

TARGETS, LAYERS = "q,v", ("q_proj", "v_proj")
BATCH = 4


@pytest.fixture(scope="module")
def task(base: BaseFiles, data: Path) -> Task:
    return Task.of(base, data, BATCH, 1e-2)


@pytest.fixture(scope="module")
def first(base: BaseFiles, data: Path) -> DeltaSet:
    """In q, v and o: more weights than are trained later."""
    result = run_of(
        base, data, "sparta", {"targets": "q,v,o", "density": 0.05, "of": "targets"}, max_steps=6,
        value_dtype="F32",
    )  # fmt: skip
    return result.delta_set


def again(
    base: BaseFiles, data: Path, first: DeltaSet, method: str, parameters: dict[str, Any],
    **settings: Any,
) -> TrainResult:  # fmt: skip
    return run_of(
        base, data, method, {"init_from": "first", **parameters}, adapters={"first": first},
        **{"batch_size": BATCH, "eval_data": data, "value_dtype": "F32", **settings},
    )  # fmt: skip


def patched(task: Task, delta_set: DeltaSet) -> dict[str, Tensor]:
    return {
        name: task.model.get_parameter(name) + torch.from_numpy(delta.dense())
        for name, delta in delta_set.deltas.items()
    }


def loss_of(task: Task, delta_set: DeltaSet) -> float:
    with torch.no_grad():
        return float(mean_loss(task.model, task.examples, patched(task, delta_set)))


SELECTING: list[tuple[str, dict[str, Any]]] = [
    ("sparta", {"targets": TARGETS, "density": 0.05, "of": "targets"}),
    ("lota", {"targets": TARGETS, "calibration_steps": 2}),
    ("lota", {"targets": TARGETS, "calibration_steps": 2, "block_size": 8}),
    ("mcs", {"targets": TARGETS, "period": 2}),
]


@pytest.mark.parametrize("method", ["sparta", "lota", "mcs"])
def test_inherited_positions_are_trained_on_from_their_values(
    method: str, base: BaseFiles, data: Path, task: Task, first: DeltaSet
) -> None:
    result = again(base, data, first, method, {})
    assert result.delta_set.deltas.keys() == first.deltas.keys()
    for name, delta in result.delta_set.deltas.items():
        np.testing.assert_array_equal(delta.positions, first.deltas[name].positions)
        assert not np.array_equal(delta.elements()[1], first.deltas[name].elements()[1])
    assert result.evaluations[0].loss == pytest.approx(loss_of(task, first), rel=1e-4)
    assert result.evaluations[-1].loss == pytest.approx(loss_of(task, result.delta_set), rel=1e-4)
    assert result.evaluations[-1].loss < result.evaluations[0].loss
    assert result.record["init_from"] == {"digest": digest(first), "nnz": first.nnz}
    assert result.record["phases"] == {"train": 4}
    parameters = result.record["parameters"]
    assert {n for n, v in parameters.items() if v is not None} == {"init_from", "init_positions"}
    assert result.record["density"]["value"] is None
    assert result.record["density"]["of"] is None


@pytest.mark.parametrize("method", ["sparta", "lota", "mcs"])
def test_weights_without_entries_are_as_if_they_were_not_there(
    method: str, base: BaseFiles, data: Path, first: DeltaSet
) -> None:
    """A file may name them."""
    none = np.array([], np.int64), np.array([], np.float32)
    empty = {
        name.replace("q_proj", layer): Delta.element(shape, *none)
        for name, shape in ((n, d.shape) for n, d in first.deltas.items() if "q_proj" in n)
        for layer in ("q_proj", "o_proj")
    }
    kept = {name: delta for name, delta in first.deltas.items() if "v_proj" in name}
    sparse, hollow = replace(first, deltas=kept), replace(first, deltas=empty | kept)
    given: list[dict[str, Any]] = [{}, {"init_positions": "select", "targets": "q"}]
    for parameters in given:
        ours, plain = (
            again(base, data, one, method, parameters, max_steps=2) for one in (hollow, sparse)
        )
        assert digest(ours.delta_set) == digest(plain.delta_set)
    with pytest.raises(AdapterError, match="no entries") as caught:
        again(base, data, replace(first, deltas=empty), method, {})
    assert caught.value.field == "init_from"


def test_the_baselines_inherit_no_positions() -> None:
    for method in ("full", "lora"):
        read = DECLARATIONS[method].read({"init_from": "first"})
        assert read.init_positions == "select"
        with pytest.raises(ParameterError) as caught:
            DECLARATIONS[method].read({"init_from": "first", "init_positions": "inherit"})
        assert caught.value.field == "parameters.init_positions"


@pytest.mark.parametrize(("method", "parameters"), SELECTING)
def test_selected_positions_begin_there_and_the_rest_stays(
    method: str, parameters: dict[str, Any], base: BaseFiles, data: Path, task: Task,
    first: DeltaSet,
) -> None:  # fmt: skip
    """In every phase the model has all of the first adapter, in the weights that are not targets
    as well."""
    result = again(base, data, first, method, {**parameters, "init_positions": "select"})
    assert result.evaluations[0].loss == pytest.approx(loss_of(task, first), rel=1e-4)
    assert result.evaluations[-1].loss == pytest.approx(loss_of(task, result.delta_set), rel=1e-4)
    for name, delta in first.deltas.items():
        before, after = delta.dense(), result.delta_set.deltas[name].dense()
        if "o_proj" in name:
            np.testing.assert_array_equal(before, after)
    trained = result.record["density"]["nnz"]
    first_positions = {(n, p) for n, d in first.deltas.items() for p in d.positions.tolist()}
    union = {(n, p) for n, d in result.delta_set.deltas.items() for p in d.elements()[0].tolist()}
    assert first_positions <= union
    assert len(union) <= trained + first.nnz
    kept = sum(
        int((d.dense() == result.delta_set.deltas[n].dense())[d.dense() != 0].sum())
        for n, d in first.deltas.items()
    )
    assert kept >= len(union) - trained


WHOLE: list[tuple[str, dict[str, Any]]] = [("full", {}), ("lora", {"rank": 2})]


@pytest.mark.parametrize(
    ("method", "parameters"),
    [*SELECTING, *((method, {"targets": TARGETS, **more}) for method, more in WHOLE)],
)
def test_at_a_rate_of_almost_nothing_the_adapter_stays_what_it_was(
    method: str, parameters: dict[str, Any], base: BaseFiles, data: Path, first: DeltaSet
) -> None:
    """Its values are where each phase begins, at the selected positions too."""
    chosen = {**parameters, "init_positions": "select"}
    result = again(base, data, first, method, chosen, learning_rate=1e-7)
    for name, delta in result.delta_set.deltas.items():
        before = first.deltas[name].dense() if name in first.deltas else np.zeros(delta.shape)
        np.testing.assert_allclose(delta.dense(), before, rtol=0, atol=1e-5)


def test_what_is_selected_is_what_changes_from_there(
    base: BaseFiles, data: Path, first: DeltaSet
) -> None:
    """|Δ| is measured from the adapter, so a huge value that does not move is not chosen for it."""
    name, delta = next(iter(first.deltas.items()))
    values = delta.elements()[1].copy()
    values[:] = 1e-3
    values[0] = 8.0
    loud = replace(first, deltas={name: Delta.element(delta.shape, delta.elements()[0], values)})
    result = again(
        base, data, loud, "lota",
        {"targets": TARGETS, "calibration_steps": 1, "init_positions": "select"},
        learning_rate=1e-4, max_steps=1, weight_decay=0.0,
    )  # fmt: skip
    assert result.record["extraction"]["unchanged"] == 0
    other = run_of(base, data, "lota", {"targets": TARGETS, "calibration_steps": 1},
                   batch_size=BATCH, learning_rate=1e-4, max_steps=1)  # fmt: skip
    assert result.record["density"]["nnz"] == other.record["density"]["nnz"]
    assert result.delta_set.nnz > other.delta_set.nnz  # the rest of the adapter, unmoved


def test_sampled_positions_are_stored_by_their_seed_only_where_nothing_else_is(
    base: BaseFiles, data: Path, first: DeltaSet, tmp_path: Path
) -> None:
    parameters = {"targets": "q,down", "density": 0.05, "of": "targets"}
    chosen = {**parameters, "init_positions": "select"}
    result = again(base, data, first, "sparta", chosen, seed=3)
    assert result.seeds
    assert all("down_proj" in name for name in result.seeds)
    result.save(tmp_path / "adapter")
    table = {name: delta.shape for name, delta in result.delta_set.deltas.items()}
    back = open_validated(tmp_path / "adapter", table, base_fingerprint=base.fingerprint)
    assert digest(back) == digest(result.delta_set)


@pytest.mark.parametrize(("method", "parameters"), WHOLE)
def test_the_baselines_begin_there_too(
    method: str, parameters: dict[str, Any], base: BaseFiles, data: Path, task: Task,
    first: DeltaSet,
) -> None:  # fmt: skip
    chosen = {"targets": "v", **parameters}
    result = again(base, data, first, method, chosen, learning_rate=1e-3)
    assert result.evaluations[0].loss == pytest.approx(loss_of(task, first), rel=1e-4)
    assert result.evaluations[-1].loss == pytest.approx(loss_of(task, result.delta_set), rel=1e-4)
    for name, delta in result.delta_set.deltas.items():
        if "v_proj" in name:
            assert delta.nnz == delta.dense().size
            assert not np.array_equal(delta.dense(), first.deltas[name].dense())
        else:
            np.testing.assert_array_equal(delta.dense(), first.deltas[name].dense())


def test_an_adapter_that_cannot_be_is_refused(base: BaseFiles, data: Path, first: DeltaSet) -> None:
    other = replace(first, base_fingerprint="1" * 64)
    for method in ("sparta", "full"):
        with pytest.raises(AdapterError, match="it is for the base"):
            again(base, data, other, method, {})
    empty = replace(first, deltas={})
    with pytest.raises(AdapterError, match="no entries") as caught:
        again(base, data, empty, "sparta", {})
    assert (caught.value.reference, caught.value.field) == ("first", "init_from")
    with pytest.raises(AdapterError, match="no adapters to begin with"):
        run_of(base, data, "sparta", {"init_from": "first"})
    result = again(base, data, empty, "sparta", {"init_positions": "select"}, max_steps=1)
    assert result.delta_set.nnz == result.record["density"]["nnz"]
