"""Sparse deltas on a device: the terms of all rows in fp32, then one sum with the product."""

from __future__ import annotations

import torch
from torch import Tensor

from gossamer.kernels.apply import check, check_terms
from gossamer.kernels.delta import EXACT_CODINGS, BoundDeltas
from gossamer.kernels.errors import ShapeError
from gossamer.kernels.gpu.block import block
from gossamer.kernels.gpu.dense import multiply, pays
from gossamer.kernels.gpu.element import element
from gossamer.kernels.gpu.launch import require
from gossamer.kernels.gpu.rows import add_terms, transposed
from gossamer.kernels.plan import WorkPlan
from gossamer.kernels.terms import Terms


def apply(y: Tensor, x: Tensor, bound: BoundDeltas, plan: WorkPlan, weights: Tensor) -> None:
    """See `gossamer.kernels.apply.apply`."""
    check(y, x, bound, plan, weights)
    require("x", x)
    require("y", y, like=x)
    add_terms(y, Terms(terms(x, bound, plan, weights), plan.touched))


def terms(x: Tensor, bound: BoundDeltas, plan: WorkPlan, weights: Tensor) -> Tensor:
    """What `apply` adds: float32 [T, out]; rows without members hold anything.

    x [T, in] is read and nothing else of the step is, so this may run beside the base's product.
    Entries first, then tiles, from small to large.

    Raises:
        ShapeError: the residents' coding is not for x's dtype, or something is on another device.
    """
    check_terms(x, bound, plan, weights)
    for name, tensor in (("bound", bound.table), ("plan", plan.data), ("weights", weights)):
        if tensor.device != x.device:
            raise ShapeError(name, f"on {x.device}", tensor.device)
    exact = EXACT_CODINGS[x.dtype]
    if bound.coding not in (exact, "int8"):
        raise ShapeError("bound", f"of coding {exact} or int8", bound.coding)
    weights = weights.contiguous()
    found = x.new_empty(x.shape[0], bound.shape[0], dtype=torch.float32)
    if plan.rest is not None and pays(plan, bound):
        multiply(found, x, bound, plan, weights)
        plan = plan.rest
    copies = transposed(x, plan)
    element(found, copies, bound, plan, weights, bound.coding == "int8")
    for side in bound.sides:
        block(found, copies, bound, plan, weights, side)
    return found
