"""What all methods share: the registry, progress, optimisers, rates, and small precision."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from gossamer.base.load import BaseFiles
from gossamer.jobs.methods import DECLARATIONS
from gossamer.store.format import digest
from gossamer.training import Started
from gossamer.training.errors import DivergedError, UnknownMethodError
from gossamer.training.methods import METHODS, Density, find_method, mcs
from gossamer.training.optimizing import Schedule, new_optimizer
from tests.training.support import Recorder, counting_examples, run_of, write_jsonl

SELECT = {"targets": "q,v", "calibration_steps": 2}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_jsonl(tmp_path_factory.mktemp("data") / "data.jsonl", counting_examples(16))


def test_methods_and_declarations_are_the_same_names() -> None:
    assert set(METHODS) == set(DECLARATIONS)
    for name, method in METHODS.items():
        assert find_method(name) is method
        assert method.declaration is DECLARATIONS[name]
    with pytest.raises(UnknownMethodError, match="sparta"):
        find_method("dora")


@pytest.mark.parametrize("name", list(METHODS))
def test_a_default_rate_is_sensible_at_every_size(name: str) -> None:
    for model in (100_000, 135_000_000, 7_000_000_000):
        for share in (1.0, 0.1, 0.001):
            density = Density(nnz=max(1, int(share * model)), targets=model, model=model)
            assert 1e-6 <= METHODS[name].learning_rate(density) <= 5e-3


RUNS: list[tuple[str, dict[str, Any], dict[str, int]]] = [
    ("sparta", {}, {"train": 5}),
    ("lota", SELECT, {"calibrate-1": 2, "train": 5}),
    ("lota", {**SELECT, "iterations": 2}, {"calibrate-1": 2, "calibrate-2": 2, "train": 5}),
    ("mcs", {"period": 1}, {"select": 4, "train": 1}),
    ("mcs", {"period": 1, "selection_epochs": 5.0}, {"select": 5}),
    ("full", {"targets": "v"}, {"train": 5}),
    ("lora", {"targets": "v", "rank": 2}, {"train": 5}),
]


@pytest.mark.parametrize(("method", "parameters", "phases"), RUNS)
def test_progress_runs_over_all_phases(
    method: str, parameters: dict[str, Any], phases: dict[str, int], base: BaseFiles, data: Path
) -> None:
    watcher, whole = Recorder(), sum(phases.values())
    result = run_of(
        base, data, method, parameters, watcher=watcher, batch_size=4, max_steps=5,
        eval_data=data, eval_steps=2, learning_rate=None,
    )  # fmt: skip
    started, steps = watcher.events[0], watcher.steps()
    assert isinstance(started, Started)
    assert (dict(started.phases), started.steps) == (phases, whole)
    assert list(started.phases) == list(phases)
    assert started.density.nnz == steps[-1].nnz == result.record["density"]["nnz"]
    assert started.learning_rate == result.record["hyper_parameters"]["learning_rate"]
    assert [step.step for step in steps] == list(range(1, whole + 1))
    assert {step.steps for step in steps} == {whole}
    expected = [name for name, count in phases.items() for _ in range(count)]
    assert [step.phase for step in steps] == expected
    assert [step.loss for step in steps] == list(result.losses)
    assert steps[-1].eta == 0 < steps[0].eta
    assert all(step.learning_rate > 0 for step in steps)
    assert result.record["phases"] == phases
    assert result.record["steps"] == whole
    # before the first step, within the last phase, and after the last step
    last = list(phases.values())[-1]
    within = [whole - last + step for step in range(2, last, 2)]
    assert [e.step for e in result.evaluations] == [0, *within, whole]


@pytest.mark.parametrize(
    ("method", "parameters", "rate"),
    [
        ("sparta", {"density": 0.05}, 1e-2),
        ("lota", {"sparsity": 0.9}, 1e-2),
        ("lota", {"sparsity": 0.9, "block_size": 8, "scope": "tensor"}, 1e-2),
        ("mcs", {"period": 2}, 1e-2),
        ("full", {}, 1e-3),
    ],
)
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_every_method_learns_and_repeats_itself(
    method: str, parameters: dict[str, Any], rate: float, precision: str, base: BaseFiles,
    data: Path,
) -> None:  # fmt: skip
    settings: dict[str, Any] = {
        "learning_rate": rate,
        "max_steps": 12,
        "eval_data": data,
        "precision": precision,
    }
    first, second = (run_of(base, data, method, parameters, **settings) for _ in range(2))
    assert first.evaluations[-1].loss < 0.75 * first.evaluations[0].loss
    assert digest(first.delta_set) == digest(second.delta_set)
    assert first.record == second.record
    assert first.delta_set.nnz == first.record["density"]["nnz"]


@pytest.mark.parametrize(("optimizer", "each"), [("adamw", 2), ("rmsprop", 1)])
@pytest.mark.parametrize("method", ["sparta", "lota", "lora"])
def test_the_optimiser_holds_so_much_for_each_value(
    method: str, optimizer: str, each: int, base: BaseFiles, data: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    kind = torch.optim.AdamW if optimizer == "adamw" else torch.optim.RMSprop
    made: list[torch.optim.Optimizer] = []
    original = kind.__init__

    def spy(self: torch.optim.Optimizer, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **kwargs)  # type: ignore[arg-type]
        made.append(self)

    monkeypatch.setattr(kind, "__init__", spy)
    result = run_of(base, data, method, {}, optimizer=optimizer, max_steps=2)
    held = sum(
        tensor.numel()
        for state in made[-1].state.values()  # of the last phase
        for tensor in state.values()
        if tensor.dim() > 0
    )
    assert held == each * result.record["density"]["nnz"]


def test_the_default_rate_makes_first_updates_of_one_size(base: BaseFiles, data: Path) -> None:
    """RMSProp's first update is ten times its rate, AdamW's is its rate."""
    moved = {}
    for optimizer in ("adamw", "rmsprop"):
        settings: dict[str, Any] = {"learning_rate": None, "max_steps": 1, "value_dtype": "F32"}
        result = run_of(base, data, "sparta", {"density": 0.05}, optimizer=optimizer, **settings)
        values = [delta.values for delta in result.delta_set.deltas.values()]
        moved[optimizer] = float(np.median(np.abs(np.concatenate(values))))
    assert moved["rmsprop"] == pytest.approx(moved["adamw"], rel=0.01)
    assert moved["adamw"] > 0


@pytest.mark.parametrize("kind", ["adamw", "rmsprop"])
def test_weight_decay_is_decoupled(kind: Any) -> None:
    """One step on a gradient of 0 shrinks a value by rate times decay, whatever the gradients."""
    for gradient in (0.0, 3.0):
        plain, decayed = (torch.nn.Parameter(torch.tensor([2.0])) for _ in range(2))
        for values, decay in ((plain, 0.0), (decayed, 0.5)):
            values.grad = torch.full((1,), gradient)
            new_optimizer(kind, [values], 0.1, decay).step()
        assert float((plain - decayed).detach()) == pytest.approx(2.0 * 0.1 * 0.5, rel=1e-5)


@pytest.mark.parametrize("kind", ["linear", "cosine", "constant"])
def test_no_step_is_made_at_a_rate_of_zero(kind: Any) -> None:
    schedule = Schedule(kind, 1.0, warmup=3, steps=10)
    factors = [schedule.factor(step) for step in range(10)]
    assert factors[:4] == [0.25, 0.5, 0.75, 1.0]
    assert factors[3:] == sorted(factors[3:], reverse=True)
    assert all(0 < factor <= 1 for factor in factors)
    behind = Schedule(kind, 1.0, warmup=3, steps=10, offset=4)
    assert [behind.factor(step) for step in range(6)] == factors[4:]
    assert Schedule(kind, 1.0, warmup=0, steps=1).factor(0) == 1.0


def test_a_seed_decides_the_order_of_the_examples(base: BaseFiles, data: Path) -> None:
    one, again, other = (
        run_of(base, data, "full", {"targets": "v"}, seed=seed, batch_size=4).losses
        for seed in (0, 0, 1)
    )
    assert one == again
    assert not np.allclose(one, other)


def test_a_score_that_is_no_number_ends_the_run(
    base: BaseFiles, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mcs._Selection, "_score", lambda self, layer, g: g * torch.nan)
    with pytest.raises(DivergedError, match="not a number") as caught:
        run_of(base, data, "mcs", {}, batch_size=4)
    assert caught.value.learning_rate == 1e-2
