"""Random adapters: the same deltas for the same recipe, made when somebody asks for them."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from gossamer.merge import Member, Mix, canonical
from gossamer.store.delta import Delta, DeltaSet
from gossamer.store.format import digest

BLOCK = 16
#: Size of a difference against its weight's standard deviation: about what fine-tuning leaves.
STRENGTH = 0.02


@dataclass(frozen=True)
class Recipe:
    """A random adapter over all linear weights.

    Attributes:
        kind: `element`, or `block` with tiles of 16 × 16.
        density: of the weights it touches; every entry (or tile) is drawn with this probability.
        seed: its own.
    """

    kind: Literal["element", "block"]
    density: float
    seed: int


@dataclass(frozen=True)
class Target:
    """What adapters are made for.

    Attributes:
        fingerprint, name: of the base.
        table: weight name → (out_features, in_features).
        deviations: weight name → standard deviation of its entries.
    """

    fingerprint: str
    name: str
    table: Mapping[str, tuple[int, int]]
    deviations: Mapping[str, float]


def make(recipe: Recipe, target: Target) -> DeltaSet:
    """The adapter of a recipe; about 0.05 s per million nonzeros."""
    rng = np.random.default_rng([recipe.seed, round(recipe.density * 1e6)])
    deltas = {}
    for name, shape in target.table.items():
        scale = np.float32(STRENGTH * target.deviations[name])
        if recipe.kind == "element":
            positions = _draw(rng, shape[0] * shape[1], recipe.density)
            values = scale * rng.standard_normal(positions.size, np.float32)
            deltas[name] = Delta.element(shape, positions, values)
        else:
            tiles = -(-shape[0] // BLOCK) * -(-shape[1] // BLOCK)
            positions = _draw(rng, tiles, recipe.density)
            values = scale * rng.standard_normal((positions.size, BLOCK, BLOCK), np.float32)
            deltas[name] = Delta.block(shape, BLOCK, positions, values)
    return DeltaSet(target.fingerprint, target.name, deltas)


def _draw(rng: np.random.Generator, size: int, density: float) -> NDArray[np.int64]:
    """Each of [0, size) with probability `density`, ascending; by gaps, so in O(result)."""
    spread = 6 * (size * density) ** 0.5 + 16
    gaps = rng.geometric(density, int(size * density + spread))
    positions = np.cumsum(gaps, dtype=np.int64) - 1
    return positions[: int(np.searchsorted(positions, size))]


class Library:
    """Adapters by digest, for the engine's loader threads.

    A fresh adapter is kept until the engine has read it once, then forgotten and made again on
    demand, so that the benchmark's own copies do not stand beside the engine's.
    """

    def __init__(self, target: Target) -> None:
        self.target = target
        self._recipes: dict[str, Recipe] = {}
        self._fresh: dict[str, DeltaSet] = {}
        self._lock = threading.Lock()

    def add(self, recipe: Recipe) -> str:
        """The digest of the recipe's adapter."""
        made = make(recipe, self.target)
        name = digest(made)
        with self._lock:
            self._recipes[name] = recipe
            self._fresh[name] = made
        return name

    def add_many(self, recipe: Recipe, count: int) -> list[str]:
        """`count` adapters that differ by their seeds, from the recipe's on."""
        return [self.add(replace(recipe, seed=recipe.seed + i)) for i in range(count)]

    def open(self, name: str) -> DeltaSet:
        """The engine's source. Raises `KeyError` for a digest that `add` never returned."""
        with self._lock:
            recipe, made = self._recipes[name], self._fresh.pop(name, None)
        return made if made is not None else make(recipe, self.target)

    def knows(self, name: str) -> bool:
        """Whether `add` returned this digest."""
        return name in self._recipes


def mix(*members: tuple[str, float]) -> Mix:
    """The canonical linear mix of (digest, weight) pairs."""
    return canonical([Member(name, weight) for name, weight in members])
