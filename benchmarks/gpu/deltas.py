"""Random deltas: packed once on the host, copied to as many places of the device as are wanted.

What a kernel reads must be distinct memory, or caches hold it; that it says the same is of no
consequence to its time.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from benchmarks.roofline.models import Weight
from gossamer.kernels import BoundDeltas, Coding, PackedDelta, Piece, WorkPlan, bind, pack

#: Standard deviation of the entries.
STRENGTH = 4e-4
_MEMBERS = 17


@dataclass(frozen=True)
class Kind:
    """What a delta is like.

    Attributes:
        density: every entry, or tile, is there with this probability.
        coding: of the values.
        side: of tiles; 0 for single entries.
    """

    density: float
    coding: Coding
    side: int = 0


def draw(generator: np.random.Generator, size: int, density: float) -> NDArray[np.int64]:
    """Each of [0, size) with probability `density`, ascending; by gaps, so in O(result)."""
    spread = 6 * (size * density) ** 0.5 + 16
    gaps = generator.geometric(density, int(size * density + spread))
    positions = np.cumsum(gaps, dtype=np.int64) - 1
    return positions[: int(np.searchsorted(positions, size))]


def pieces(weight: Weight, kind: Kind, seed: int) -> list[Piece]:
    """A piece a projection. The tiles' side divides rows and columns."""
    generator = np.random.default_rng([seed, round(1e6 * kind.density), kind.side])
    found, offset = [], 0
    cells = kind.side**2 or 1
    for projection, rows in enumerate(weight.projections):
        positions = draw(generator, rows * weight.columns // cells, kind.density)
        shape = (len(positions), kind.side, kind.side) if kind.side else (len(positions),)
        values = np.float32(STRENGTH) * generator.standard_normal(shape, np.float32)
        found.append(
            Piece("block" if kind.side else "element", projection, offset, rows, kind.side,
                  torch.from_numpy(positions), torch.from_numpy(values))
        )  # fmt: skip
        offset += rows
    return found


def packed(weight: Weight, kind: Kind, seed: int = 0) -> PackedDelta:
    """One delta on the host, as the device reads it."""
    parts = pieces(weight, kind, seed)
    shape = (weight.rows, weight.columns)
    return pack(parts, shape, len(weight.projections), "triton", kind.coding)


class Deltas:
    """Packed deltas of a run, by weight and kind: 70 MB for a layer at the highest density."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._host: dict[tuple[str, int, int, Kind, int], PackedDelta] = {}

    def host(self, weight: Weight, kind: Kind, seed: int = 0) -> PackedDelta:
        """On the host."""
        key = (weight.name, weight.rows, weight.columns, kind, seed)
        if key not in self._host:
            self._host[key] = packed(weight, kind, seed)
        return self._host[key]

    def on_device(self, weight: Weight, kind: Kind, count: int) -> list[PackedDelta]:
        """`count` of them, each in memory of its own."""
        first = self.host(weight, kind)
        data = first.data.to(self._device)
        return [first.moved(data.clone()) for _ in range(count)]

    def bound(self, weight: Weight, kind: Kind, count: int) -> BoundDeltas:
        """The same, bound."""
        deltas = self.on_device(weight, kind, count)
        return bind(deltas, (weight.rows, weight.columns), "triton", self._device)


def row_slots(rows: int, adapters: int) -> list[tuple[int, ...]]:
    """Which adapters each row runs with: all in turn, or where there are more of them than rows a
    mix of as many in every row."""
    if adapters <= rows:
        return [(row % adapters,) for row in range(rows)]
    members = -(-adapters // rows)
    return [tuple(range(adapters))[row * members : (row + 1) * members] for row in range(rows)]


def plan_of(rows: int, adapters: int, device: torch.device) -> tuple[WorkPlan, torch.Tensor]:
    """The plan of such a step, and weights of 1, on the device.

    As many members wide as the engine's, or an odd number more: a stride of 1 or of 16 would have
    Triton compile another `element`, for several seconds.
    """
    plan = WorkPlan.build(row_slots(rows, adapters))
    members = max(plan.members, _MEMBERS) | 1
    return plan.to(device), torch.ones(rows, members, 1, device=device)
