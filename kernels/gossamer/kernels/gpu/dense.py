"""Many rows with the same members: Δ spread out, and a dense product.

Gathering takes the same instructions for an entry and 16 rows again and again; a product on tensor
cores takes next to none for a row, once Δ is spread out. The scratch holds Δ alone, in the dtype of
the step, which holds its values exactly (but for int8 ones, whose scale it rounds in): W + Δ would
be rounded to another model.
"""

from __future__ import annotations

import torch
from torch import Tensor

from gossamer.kernels.delta import BoundDeltas, PackedDelta
from gossamer.kernels.gpu import layout
from gossamer.kernels.gpu.scatter import dense
from gossamer.kernels.plan import LargeSet, WorkPlan

#: A dense product is taken where every member has at least this density, and rows times density
#: reach `ROWS_TIMES_DENSITY`. Predicted for an H200 (`python -m benchmarks.roofline`); no card has
#: been asked yet.
DENSITY, ROWS_TIMES_DENSITY = 0.02, 6.9


def pays(plan: WorkPlan, bound: BoundDeltas) -> bool:
    """Whether all large member sets are better multiplied with on this weight."""
    return all(_pays(found, bound) for found in plan.large)


def _pays(found: LargeSet, bound: BoundDeltas) -> bool:
    elements = bound.shape[0] * bound.shape[1]
    densities = [delta.nnz / elements for delta in _members(found, bound)]
    return all(d >= DENSITY and d * found.count >= ROWS_TIMES_DENSITY for d in densities)


def _members(found: LargeSet, bound: BoundDeltas) -> list[PackedDelta]:
    return [delta for slot in found.slots if (delta := bound.deltas[slot]) is not None]


def multiply(terms: Tensor, x: Tensor, bound: BoundDeltas, plan: WorkPlan, weights: Tensor) -> None:
    """Semantics: terms[t] = Σ_j weights[t, j] · (Δ_j x[t]) for the rows t of the large sets.

    In fp32, each product first and then its weight; a weight of 0 masks. The scratch takes as much
    as the weight itself, for one member at a time.
    """
    for found in plan.large:
        rows = plan.rows_of(found)
        inputs = x[rows]
        total = terms.new_zeros(found.count, bound.shape[0])
        for j, slot in enumerate(found.slots):
            delta = bound.deltas[slot]
            if delta is None:
                continue
            product = _product(inputs, dense(delta, x.dtype))
            weight = weights[rows, j]
            if weights.shape[2] > 1:
                outputs = torch.arange(bound.shape[0], device=x.device)
                boundaries = delta.record[layout.BOUNDARIES]
                weight = weight[:, layout.projection_of(boundaries, outputs)]
            total += torch.where(weight != 0, weight * product, 0)
        terms[rows] = total


def _product(x: Tensor, matrix: Tensor) -> Tensor:
    """x Δᵀ in float32."""
    if x.device.type == "cuda" and x.dtype is not torch.float32:
        return torch.mm(x, matrix.t(), out_dtype=torch.float32)
    return x.float() @ matrix.float().t()
