"""The base products of a step, and how to time what runs beside them."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from benchmarks.common import Meter
from benchmarks.roofline.models import MODELS
from gossamer.kernels import Backend, linear

MODEL = MODELS["smollm2-135m"]


class Line(NamedTuple):
    """One measurement, times in milliseconds a step."""

    what: str
    kind: str
    density: float
    rows: int
    entries: int
    megabytes: float
    predicted: float
    added: float
    base: float
    share: float
    foreign: float


@dataclass(frozen=True)
class Bench:
    """The base products and how to time.

    Attributes:
        base: by layer, the patched weights in the order of `MODEL.weights`, transposed.
        rounds: of every measurement, after one that does not count.
        bandwidth: bytes a second.
        clock: seconds.
    """

    base: list[list[Tensor]]
    rounds: int
    bandwidth: float
    clock: Callable[[], float]

    def inputs(self, rows: int) -> dict[int, Tensor]:
        """What the products take, by the columns of their weight."""
        return {
            columns: torch.randn(rows, columns) for columns in (MODEL.hidden, MODEL.intermediate)
        }

    def products(self, x: dict[int, Tensor], backend: Backend = "cpu") -> None:
        """All products of a step."""
        for layer in self.base:
            for weight in layer:
                linear(x[weight.shape[0]], weight, True, backend)

    def predicted(self, nbytes: int) -> float:
        """Milliseconds that it takes to move so many bytes."""
        return 1e3 * nbytes / self.bandwidth

    def alternate(self, *steps: Callable[[], object]) -> tuple[list[float], float]:
        """Median milliseconds of each step, run in turn; and the foreign share."""
        times: list[list[float]] = [[] for _ in steps]
        with Meter() as meter:
            for _ in range(self.rounds + 1):
                for step, collected in zip(steps, times, strict=True):
                    start = self.clock()
                    step()
                    collected.append(1e3 * (self.clock() - start))
        return [statistics.median(t[1:]) for t in times], meter.foreign


def bandwidth() -> float:
    """Bytes a second that a copy moves, reading and writing."""
    source = torch.ones(64 << 20)
    target = torch.empty_like(source)
    times = []
    for _ in range(7):
        start = time.perf_counter()
        target.copy_(source)
        times.append(time.perf_counter() - start)
    return 2 * source.nbytes / statistics.median(times)
