"""Means over seeds and examples with paired bootstrap intervals.

Three seeds alone say nothing. Two arms answer the same held-out examples of each seed, so their
difference is taken example by example, and the examples are drawn again, those of each seed among
themselves. The interval is about other examples of these tasks, and not about other seeds: what
each seed gives is shown beside it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

RESAMPLES = 10_000
#: Seed → bool or number per held-out example.
BySeed = Mapping[int, NDArray[Any]]


@dataclass(frozen=True)
class Interval:
    """Attributes:
    mean: over examples, then seeds.
    low, high: of the 95 % bootstrap interval, the percentiles 2.5 and 97.5.
    seeds: the mean of each.
    """

    mean: float
    low: float
    high: float
    seeds: Mapping[int, float]

    @property
    def excludes_zero(self) -> bool:
        """Whether the examples tell a difference from chance."""
        return self.low > 0.0 or self.high < 0.0


def interval(values: BySeed, resamples: int = RESAMPLES) -> Interval:
    """Of the mean of `values`; deterministic.

    Raises:
        ValueError: there are none.
    """
    if not values or not all(len(one) for one in values.values()):
        raise ValueError("there are no values")
    generator = np.random.default_rng(0)
    means = np.zeros(resamples)
    for seed in sorted(values):
        found = np.asarray(values[seed], dtype=np.float64)
        drawn = generator.integers(len(found), size=(resamples, len(found)))
        means += found[drawn].mean(axis=1) / len(values)
    low, high = np.percentile(means, (2.5, 97.5))
    seeds = {seed: float(np.mean(values[seed])) for seed in sorted(values)}
    return Interval(float(np.mean(list(seeds.values()))), float(low), float(high), seeds)


def difference(one: BySeed, other: BySeed, resamples: int = RESAMPLES) -> Interval:
    """Of one minus other, over the seeds that both have.

    Raises:
        ValueError: they share none, or have different numbers of examples.
    """
    shared = sorted(set(one) & set(other))
    if any(len(one[seed]) != len(other[seed]) for seed in shared):
        raise ValueError("the examples are not the same")
    paired = {seed: one[seed].astype(np.float64) - other[seed] for seed in shared}
    return interval(paired, resamples)
