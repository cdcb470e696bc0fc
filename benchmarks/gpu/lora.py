"""Low-rank adapters as they are served: rows grouped by adapter, shrunk and expanded.

The reference is batched torch (`torch.bmm`, the library's own kernels): one product for x Aᵀ of all
packed projections, then one for each projection's B. It gives each projection its own output, which
is less than a server must do. In a graph, as our own launches are.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks.gpu.bench import Bench
from benchmarks.gpu.deltas import Kind, plan_of
from benchmarks.gpu.setting import EQUAL_BYTES, EQUAL_PARAMETERS
from benchmarks.roofline.models import Weight
from gossamer.kernels import compute_terms


@dataclass(frozen=True, eq=False)
class _LoRA:
    """Distinct adapters of one weight: `down` [adapters, in, rank · projections], and `up`, of each
    projection [adapters, rank, out]."""

    down: Tensor
    up: tuple[Tensor, ...]

    @classmethod
    def random(cls, weight: Weight, rank: int, adapters: int, like: Tensor) -> _LoRA:
        count = len(weight.projections)
        down = like.new_empty(adapters, weight.columns, rank * count).normal_()
        up = tuple(like.new_empty(adapters, rank, rows).normal_() for rows in weight.projections)
        return cls(down, up)

    @property
    def nbytes(self) -> int:
        return self.down.nbytes + sum(up.nbytes for up in self.up)

    def terms(self, x: Tensor) -> Tensor:
        """x [adapters, rows of each, in]; of the last projection, all computed."""
        shrunk = torch.bmm(x, self.down)
        parts = shrunk.chunk(len(self.up), dim=2)
        return [torch.bmm(part, up) for part, up in zip(parts, self.up, strict=True)][-1]


def lora(bench: Bench) -> None:
    """A layer's four weights: LoRA at equal parameters and at equal bytes, beside `element`."""
    setting, model = bench.setting, bench.setting.model
    loads = itertools.product(setting.rows, setting.kernel_adapters)
    for rows, adapters in bench.cases((r, a) for r, a in loads if a <= r):
        for rank, equal in ((EQUAL_PARAMETERS, "parameters"), (EQUAL_BYTES, "bytes")):
            found = [_lora(bench, weight, rank, rows, adapters) for weight in model.weights]
            bench.record.add(
                "lora", f"rank {rank}", sum(t for t, _ in found), "ms", model=model.name,
                rows=rows, adapters=adapters, nbytes=sum(n for _, n in found),
                note=f"a layer; batched torch; equal {equal} at {100 * setting.equal:g} %",
            )  # fmt: skip
        for coding in setting.codings:
            kind = Kind(setting.equal, coding)
            found = [_sparse(bench, weight, kind, rows, adapters) for weight in model.weights]
            bench.record.add(
                "lora", "element", sum(t for t, _ in found), "ms", model=model.name, rows=rows,
                adapters=adapters, density=kind.density, coding=coding,
                nbytes=sum(n for _, n in found), note="a layer; the copies of x included",
            )  # fmt: skip


def _lora(bench: Bench, weight: Weight, rank: int, rows: int, adapters: int) -> tuple[float, float]:
    """Milliseconds and bytes."""
    setting = bench.setting
    x = torch.randn(adapters, rows // adapters, weight.columns, device=setting.device)
    x = x.to(setting.dtype)
    made = _LoRA.random(weight, rank, adapters, x)
    return bench.timer.launched(lambda: made.terms(x)), made.nbytes


def _sparse(
    bench: Bench, weight: Weight, kind: Kind, rows: int, adapters: int
) -> tuple[float, float]:
    setting = bench.setting
    bound = bench.deltas.bound(weight, kind, adapters)
    plan, weights = plan_of(rows, adapters, setting.device)
    x = torch.randn(rows, weight.columns, device=setting.device).to(setting.dtype)
    taken = bench.timer.launched(lambda: compute_terms(x, bound, plan, weights).values)
    return taken, sum(d.data.nbytes for d in bound.deltas if d is not None)
