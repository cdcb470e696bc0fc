"""Deltas written into weights and taken out again, packed on the host, and gathered in prefills."""

from __future__ import annotations

import itertools
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from benchmarks.gpu.bench import Bench
from benchmarks.gpu.deltas import Kind, pieces, plan_of
from benchmarks.roofline.models import Weight
from gossamer.kernels import (
    PackedDelta,
    Saved,
    Target,
    bind,
    compute_terms,
    fuse_into,
    pack,
    restore,
)
from gossamer.kernels.gpu.dense import ROWS_TIMES_DENSITY, multiply
from gossamer.kernels.plan import LargeSet

#: Cycles of all layers before their bits are compared.
_ALL_LAYERS = 20


class NotRestoredError(Exception):
    """Fusing and undoing left a trace."""

    def __init__(self, what: str, cycles: int) -> None:
        super().__init__(f"{what}: other bits after {cycles} cycles")
        self.what = what
        self.cycles = cycles


@dataclass(frozen=True, eq=False)
class _Fusable:
    """Weights of a model and a delta for each, listed once."""

    targets: list[Target]
    listed: Saved

    @classmethod
    def of(cls, bench: Bench, kind: Kind, layers: int) -> _Fusable:
        setting = bench.setting
        targets = []
        for weight in setting.model.weights * layers:
            matrix = torch.randn(weight.rows, weight.columns, device=setting.device)
            delta = bench.deltas.on_device(weight, kind, 1)[0]
            targets.append(Target(matrix.to(setting.dtype), [delta], torch.ones(1, 1)))
        listed = fuse_into(targets, "triton")
        listed.restore()
        return cls(targets, listed)

    @property
    def weights(self) -> list[Tensor]:
        """As they are now."""
        return [target.weight for target in self.targets]

    def as_the_engine(self) -> None:
        """Listed, fused, restored."""
        restore(fuse_into(self.targets, "triton"))


def fusing(bench: Bench) -> None:
    """All weights of the model: the launch alone, then with its listing; bits compared."""
    setting, record = bench.setting, bench.record
    kinds = [Kind(setting.equal, coding) for coding in setting.codings]
    kinds += [Kind(d, setting.coding) for d in setting.step_densities if d < setting.equal]
    for kind in bench.cases(kinds):
        model = _Fusable.of(bench, kind, setting.model.layers)
        before = [matrix.clone() for matrix in model.weights]
        entries = sum(delta.nnz for target in model.targets for delta in target.deltas)
        undo, fuse = model.listed.restore, model.listed.write
        found = {"fuse": bench.timer.started(fuse, undo)}
        fuse()
        found["undo"] = bench.timer.started(undo, fuse)
        undo()
        found["fuse and undo, listed first"] = bench.timer.waited(model.as_the_engine)
        for what, taken in found.items():
            record.add("fuse", what, taken, "ms", model=setting.model.name, adapters=1,
                       density=kind.density, coding=kind.coding,
                       note=f"{entries / 1e6:.3g} M entries")  # fmt: skip
        for _ in range(min(_ALL_LAYERS, setting.cycles)):
            fuse()
            undo()
        _compare("all layers", model.weights, before, min(_ALL_LAYERS, setting.cycles))
    _many_cycles(bench, kinds[0])


def _many_cycles(bench: Bench, kind: Kind) -> None:
    """One layer, again and again, while there is time."""
    layer = _Fusable.of(bench, kind, 1)
    before = [matrix.clone() for matrix in layer.weights]
    done = 0
    while done < bench.setting.cycles and (done < 2 or not bench.ended):
        layer.listed.write()
        if done == 0 and all(map(_same_bits, layer.weights, before)):
            raise NotRestoredError("fusing changed nothing", 1)
        layer.listed.restore()
        done += 1
    _compare("one layer", layer.weights, before, done)
    bench.record.add("fuse", "cycles of one layer, bit-exact", done, "cycles",
                     model=bench.setting.model.name, adapters=1, density=kind.density,
                     coding=kind.coding)  # fmt: skip


def _same_bits(left: Tensor, right: Tensor) -> bool:
    kind = torch.int32 if left.itemsize == 4 else torch.int16
    return torch.equal(left.view(kind), right.view(kind))


def _compare(what: str, weights: Sequence[Tensor], before: Sequence[Tensor], cycles: int) -> None:
    if not all(map(_same_bits, weights, before)):
        raise NotRestoredError(what, cycles)


def packing(bench: Bench) -> None:
    """Entries a second on one core of the host, of the largest weight."""
    setting = bench.setting
    weight = setting.model.weights[2]
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        cases = itertools.product(setting.densities, setting.codings)
        for density, coding in bench.cases(cases):
            parts = pieces(weight, Kind(density, coding), 0)
            shape, count = (weight.rows, weight.columns), len(weight.projections)
            found = []
            for _ in range(2 if density > setting.equal else setting.repetitions):
                start = time.perf_counter()
                delta = pack(parts, shape, count, "triton", coding)
                found.append(time.perf_counter() - start)
            bench.record.add("pack", weight.name, delta.nnz / min(found), "entries/s",
                             model=setting.model.name, density=density, coding=coding,
                             note="one thread")  # fmt: skip
    finally:
        torch.set_num_threads(threads)


def prefill(bench: Bench) -> None:
    """One adapter on all rows of a chunk: its entries gathered, or a dense scratch multiplied.

    Of one layer, times the layers; what both add to the base's own products.
    """
    setting, model = bench.setting, bench.setting.model
    for coding in setting.codings:
        for density in bench.cases(setting.prefill_densities):
            kind = Kind(density, coding)
            deltas = [bench.deltas.on_device(weight, kind, 1)[0] for weight in model.weights]
            better: int | None = None
            for rows in setting.prefill_rows:
                each = [_both(bench, weight, delta, rows)
                        for weight, delta in zip(model.weights, deltas, strict=True)]  # fmt: skip
                gather, dense = (model.layers * sum(times) for times in zip(*each, strict=True))
                for what, taken in (("gather", gather), ("dense", dense)):
                    bench.record.add("prefill", what, taken, "ms", model=model.name, rows=rows,
                                     adapters=1, density=density, coding=coding)  # fmt: skip
                better = rows if better is None and dense < gather else better
            note = f"not up to {setting.prefill_rows[-1]} rows"
            if better is not None:
                times = better * density
                note = f"rows x density {times:.3g}; dispatched on from {ROWS_TIMES_DENSITY:g}"
            bench.record.add("crossover", "scratch from", better or 0, "rows", model=model.name,
                             adapters=1, density=density, coding=coding, note=note)  # fmt: skip


def _both(bench: Bench, weight: Weight, delta: PackedDelta, rows: int) -> tuple[float, float]:
    """Gathered, and through the scratch, whatever would be chosen."""
    setting = bench.setting
    x = torch.randn(rows, weight.columns, device=setting.device).to(setting.dtype)
    bound = bind([delta], delta.shape, "triton", setting.device)
    plan, weights = plan_of(rows, 1, setting.device)
    small = replace(plan, large=(), rest=None)
    large = replace(plan, large=(LargeSet(0, rows, (0,)),))
    terms = torch.empty(rows, weight.rows, dtype=torch.float32, device=setting.device)
    gather = bench.timer.started(lambda: compute_terms(x, bound, small, weights))
    dense = bench.timer.started(lambda: multiply(terms, x, bound, large, weights))
    return gather, dense
