"""What deltas add to a step of base products: decoding rows, and a chunk of a prefill."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from benchmarks.kernels.bench import MODEL, Bench, Line
from benchmarks.kernels.deltas import residents
from gossamer.kernels import BoundDeltas, Target, WorkPlan, apply, fuse_into, linear

DENSITIES = (0.0005, 0.005, 0.01, 0.023, 0.1)
RowSlots = Sequence[tuple[int, ...]]


def decode(bench: Bench) -> list[Line]:
    """16 rows: over 8 adapters, all on one, all on one mix of 4; element and block."""
    lines = []
    cases = [("element", d) for d in DENSITIES] + [("block", d) for d in DENSITIES[2:]]
    for kind, density in cases:
        deltas = residents(kind, density, 8)
        for what, row_slots in (
            ("16 rows, 8 adapters", [(i // 2,) for i in range(16)]),
            ("16 rows, 1 adapter", [(0,)] * 16),
            ("16 rows, one mix of 4", [(0, 1, 2, 3)] * 16),
            ("16 rows, a pair each", [(i % 8, (i + 1 + i // 8) % 8) for i in range(16)]),
        ):
            lines.append(sparse(bench, what, kind, density, deltas, row_slots))
    return lines


def prefill(bench: Bench) -> list[Line]:
    """512 rows of one adapter, beside a dense scratch of Δ with a second product."""
    lines = []
    for density in (0.01, 0.1, 0.3):
        deltas = residents("element", density, 1)
        one = [(0,)] * 512
        lines.append(sparse(bench, "512 rows, 1 adapter", "element", density, deltas, one))
        lines.append(dense_scratch(bench, density, deltas))
    return lines


def sparse(
    bench: Bench, what: str, kind: str, density: float, deltas: list[list[BoundDeltas]],
    row_slots: RowSlots,
) -> Line:  # fmt: skip
    """What the deltas add as the engine applies them."""
    plan = WorkPlan.build(row_slots)
    rows = len(row_slots)
    weights = torch.rand(rows, max(1, plan.members), 1) + 0.5
    x = bench.inputs(rows)

    def base() -> None:
        bench.products(x)

    def mixed() -> None:
        for layer, bound in zip(bench.base, deltas, strict=True):
            for weight, b in zip(layer, bound, strict=True):
                y = linear(x[weight.shape[0]], weight, transposed=True)
                apply(y, x[weight.shape[0]], b, plan, weights)

    (base_ms, mixed_ms), foreign = bench.alternate(base, mixed)
    used = {slot for slots in row_slots for slot in slots}
    packed = [b.deltas[s] for layer in deltas for b in layer for s in used]
    present = [p for p in packed if p is not None]
    nbytes = sum(p.data.nbytes for p in present)
    return Line(what, kind, density, rows, sum(p.nnz for p in present), nbytes / 1e6,
                bench.predicted(nbytes), mixed_ms - base_ms, base_ms,
                base_ms / mixed_ms, foreign)  # fmt: skip


def dense_scratch(bench: Bench, density: float, deltas: list[list[BoundDeltas]]) -> Line:
    """What a dense scratch would add: zero it, scatter Δ into it, multiply, add."""
    x = bench.inputs(512)
    scratch = [torch.empty(w.columns, w.rows) for w in MODEL.weights]
    one = torch.ones(1, 1)

    def base() -> None:
        bench.products(x)

    def mixed() -> None:
        for layer, bound in zip(bench.base, deltas, strict=True):
            for weight, b, room in zip(layer, bound, scratch, strict=True):
                y = linear(x[weight.shape[0]], weight, transposed=True)
                fuse_into([Target(room.zero_(), [p for p in b.deltas if p], one, True)])
                y.addmm_(x[weight.shape[0]], room)

    (base_ms, mixed_ms), foreign = bench.alternate(base, mixed)
    nbytes = 4 * MODEL.elements
    return Line("512 rows, dense scratch", "element", density, 512, 0, nbytes / 1e6,
                base_ms, mixed_ms - base_ms, base_ms, base_ms / mixed_ms, foreign)  # fmt: skip
