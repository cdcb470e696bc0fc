"""What applying sparse deltas means, in plain torch."""

from __future__ import annotations

import torch
from torch import Tensor

from gossamer.kernels.apply import check
from gossamer.kernels.delta import BoundDeltas, entries
from gossamer.kernels.plan import WorkPlan


def apply(y: Tensor, x: Tensor, bound: BoundDeltas, plan: WorkPlan, weights: Tensor) -> None:
    """See `gossamer.kernels.apply.apply`. Any float dtype; sums in fp32."""
    check(y, x, bound, plan, weights)
    for first, count, first_member, members in plan.chunks.tolist():
        rows = plan.order[first : first + count].to(y.device)
        inputs = x[rows].float()
        term = torch.zeros(count, y.shape[1], device=y.device)
        for j, slot in enumerate(plan.sets[first_member : first_member + members].tolist()):
            delta = bound.deltas[slot]
            for projection, row, column, value in entries(delta) if delta is not None else ():
                weight = weights[rows, j, projection if weights.shape[2] > 1 else 0][:, None]
                part = torch.zeros_like(term).index_add_(1, row, inputs[:, column] * value)
                term += torch.where(weight != 0, weight * part, 0)
        y[rows] = (y[rows].float() + term).to(y.dtype)
