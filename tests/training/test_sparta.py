"""Positions from a seed, the denominators of a density, and what the targets name."""

import hashlib
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from gossamer.jobs.methods import SpartaParameters
from gossamer.store.format import seeded_positions
from gossamer.training.errors import ConfigError, DensityError, UnknownTargetError
from gossamer.training.methods import Density
from gossamer.training.methods.sparta import SPARTA, Drawn, draw
from gossamer.training.methods.targets import match_targets
from tests.training.references import Task, assert_values, masked_adamw, masks_of
from tests.training.support import counting_examples, run_of, tiny_base, write_jsonl

LAYERS = ("q_proj", "k_proj", "v_proj", "o_proj", "up_proj", "down_proj")
SHAPES = {"q_proj": (64, 64), "k_proj": (16, 64), "v_proj": (16, 64), "o_proj": (64, 64)}
TABLE = {
    f"model.layers.{layer}.part.{name}.weight": SHAPES.get(name, (96, 64))
    for layer in range(3)
    for name in LAYERS
}
PACKED = {"model.layers.0.self_attn.qkv_proj.weight": (96, 64), "layers.0.o_proj.weight": (64, 64)}
MODEL = sum(math.prod(shape) for shape in TABLE.values())


def select(seed: int = 7, **parameters: Any) -> Drawn:
    return draw(SpartaParameters(**parameters), TABLE, seed)


@pytest.mark.parametrize("of", ["model", "targets"])
@pytest.mark.parametrize("density", [0.001, 0.01, 0.0737, 0.1])
def test_the_number_of_positions_is_exactly_the_density(of: str, density: float) -> None:
    selection = select(density=density, of=of)
    targets = sum(math.prod(TABLE[name]) for name in selection.positions)
    wanted = round(density * (MODEL if of == "model" else targets))
    assert sum(where.size for where in selection.positions.values()) == wanted
    assert selection.density.nnz == wanted
    assert selection.density.targets == targets
    assert selection.density.model == MODEL
    assert getattr(selection.density, f"of_{of}") == pytest.approx(density, abs=0.5 / targets)


def test_positions_are_spread_over_the_targets_by_their_size() -> None:
    selection = select(density=0.05)
    assert {name.split(".")[-2] for name in selection.positions} == {"v_proj", "o_proj"}
    share = selection.density.of_targets
    for name, where in selection.positions.items():
        assert abs(where.size - share * math.prod(TABLE[name])) <= 1
        assert np.all(np.diff(where) > 0)
        assert where[0] >= 0
        assert where[-1] < math.prod(TABLE[name])


def test_the_seed_alone_gives_the_positions_back() -> None:
    selection = select(density=0.03, seed=11)
    for name, where in selection.positions.items():
        assert selection.seed == 11
        again = seeded_positions(11, name, math.prod(TABLE[name]), where.size)
        np.testing.assert_array_equal(where, again)


def test_another_seed_or_weight_has_other_positions() -> None:
    first, second = select(seed=1).positions, select(seed=2).positions
    name, *others = first
    assert not np.array_equal(first[name], second[name])
    same_shape = [other for other in others if TABLE[other] == TABLE[name]]
    assert same_shape
    assert not any(np.array_equal(first[name], first[other]) for other in same_shape)


def test_a_seed_of_the_mask_replaces_that_of_the_run() -> None:
    one, other = select(seed=1, mask_seed=5), select(seed=2, mask_seed=5)
    assert one.seed == 5
    for name, where in one.positions.items():
        np.testing.assert_array_equal(where, other.positions[name])


def test_a_golden_selection_never_changes() -> None:
    """The same on every machine: a digest of all positions, not a property of them."""
    golden = "4e6366a501a290e955a1b9aa2d876419a4a22735335bb9fbedd0d13d3a1dd113"
    state = hashlib.sha256()
    for name, where in sorted(select(density=0.02, seed=123).positions.items()):
        state.update(name.encode() + where.astype("<i8").tobytes())
    assert state.hexdigest() == golden


def test_a_density_that_the_targets_cannot_hold_is_refused() -> None:
    with pytest.raises(DensityError) as caught:
        select(density=0.5)
    assert caught.value.wanted > caught.value.available
    assert caught.value.field == "density"
    select(density=caught.value.largest)  # what the message offers is possible
    offered = re.search(r"from (\S+) to (\S+),", caught.value.remedy)
    assert offered is not None
    for density in offered.groups():
        select(density=float(density))
    select(density=1.0, of="targets")


def test_a_density_that_leaves_nothing_is_refused() -> None:
    with pytest.raises(DensityError):
        select(density=1e-9)


def test_a_share_too_small_for_every_weight_leaves_weights_out() -> None:
    selection = select(density=4 / MODEL)
    assert selection.density.nnz == 4
    assert sum(where.size for where in selection.positions.values()) == 4
    assert all(where.size for where in selection.positions.values())


@pytest.mark.parametrize(
    ("targets", "layers"),
    [
        ("v,o", {"v_proj", "o_proj"}),
        (" q , k ", {"q_proj", "k_proj"}),
        ("down_proj", {"down_proj"}),
        ("all-linear", set(LAYERS)),
        (r"re:layers\.[01]\..*\.q_proj", {"q_proj"}),
        ("re:(up|down)_proj,?", {"up_proj", "down_proj"}),
    ],
)
def test_targets_name_layers(targets: str, layers: set[str]) -> None:
    found = match_targets(targets, TABLE)
    assert {name.split(".")[-2] for name in found} == layers
    assert list(found) == [name for name in TABLE if name in found]


def test_a_regular_expression_may_choose_layers_by_number() -> None:
    assert len(match_targets(r"re:layers\.1\.", TABLE)) == len(LAYERS)


def test_a_packed_projection_is_taken_whole() -> None:
    assert set(match_targets("v,o", PACKED)) == set(PACKED)


@pytest.mark.parametrize("targets", ["x", "v,nothing", "re:nothing", "v_proj.weight"])
def test_a_target_that_matches_nothing_is_named(targets: str) -> None:
    with pytest.raises(UnknownTargetError) as caught:
        match_targets(targets, TABLE)
    assert caught.value.target in targets
    assert "q_proj" in caught.value.why


@pytest.mark.parametrize("targets", ["", " , ", "re:("])
def test_targets_that_cannot_be_read_are_refused(targets: str) -> None:
    with pytest.raises(ConfigError) as caught:
        match_targets(targets, TABLE)
    assert caught.value.field == "parameters.targets"


def test_the_default_learning_rate_falls_with_density_and_size() -> None:
    def rate(of_model: float, model: int) -> float:
        nnz = round(of_model * model)
        return float(SPARTA.learning_rate(Density(nnz=nnz, targets=model // 8, model=model)))

    densities = (0.1, 0.05, 0.005, 0.0005)
    by_density = [rate(density, 2_000_000_000) for density in densities]
    assert by_density == sorted(set(by_density))
    by_size = [rate(0.005, size) for size in (7_000_000_000, 2_000_000_000, 100_000_000)]
    assert by_size == sorted(set(by_size))
    assert rate(0.005, 1_000_000_000) == pytest.approx(1e-3)
    assert rate(1e-6, 1_000_000) <= 5e-3
    assert rate(1.0, 10**15) >= 1e-5


def test_the_values_are_what_masked_training_gives(
    tiny_dir: Callable[..., Path], tmp_path: Path
) -> None:
    """Adam on the drawn entries alone, against a dense change under a mask."""
    base = tiny_base(tiny_dir("llama"))
    data = write_jsonl(tmp_path / "data.jsonl", counting_examples(12))
    result = run_of(
        base, data, "sparta", {"density": 0.05, "of": "targets"}, batch_size=4, max_steps=4,
        learning_rate=3e-3, value_dtype="F32",
    )  # fmt: skip
    task = Task.of(base, data, 4, 3e-3)
    weights = task.weights("v_proj", "o_proj")
    masks = masks_of(result.delta_set, list(weights), weights)
    total = sum(weight.numel() for weight in weights.values())
    assert sum(int(mask.sum()) for mask in masks.values()) == round(0.05 * total)
    zero = {name: torch.zeros_like(weight) for name, weight in weights.items()}
    assert_values(result.delta_set, masked_adamw(task, masks, zero, 0, 4, 4))
    with pytest.raises(AssertionError):
        assert_values(result.delta_set, masked_adamw(task, masks, zero, 0, 3, 4))
