"""The sizes and rates that the coding was chosen for."""

from __future__ import annotations

import runpy
from pathlib import Path

import numpy as np
import pytest

_BENCHMARK = runpy.run_path(str(Path(__file__).parents[2] / "benchmarks" / "format.py"))
measure, missed, random_mask = (_BENCHMARK[name] for name in ("measure", "missed", "random_mask"))


@pytest.mark.parametrize("density", [0.0005, 0.005, 0.01, 0.1])
def test_positions_stay_close_to_their_floor(density: float) -> None:
    row = measure("135M", "element", density, rounds=1)
    assert row.position_ratio < (1.15 if density < 0.005 else 1.06)
    assert row.position_ratio > 0.99  # below the floor, the mask would not be what it claims
    if density == 0.01:
        assert row.total_bits < 21


@pytest.mark.gate
@pytest.mark.parametrize("density", [0.0005, 0.005, 0.01, 0.1])
@pytest.mark.parametrize("kind", ["element", "block"])
def test_no_target_is_missed_on_a_large_model(kind: str, density: float) -> None:
    assert missed(measure("8B layer", kind, density, rounds=3)) == []


def test_the_benchmarks_mask_has_the_density_it_says() -> None:
    where = random_mask(np.random.default_rng(0), 1_000_000, 0.01)
    assert 9_500 < where.size < 10_500
    assert where[-1] > 999_000
    assert (np.diff(where) > 0).all()
