"""Sparse deltas added to a dense product, every row with its own adapters and weights."""

from __future__ import annotations

import torch
from torch import Tensor

from gossamer.kernels.backends import Backend, implementation
from gossamer.kernels.delta import BoundDeltas
from gossamer.kernels.errors import ShapeError
from gossamer.kernels.plan import WorkPlan


def apply(
    y: Tensor,
    x: Tensor,
    bound: BoundDeltas,
    plan: WorkPlan,
    weights: Tensor,
    backend: Backend = "cpu",
) -> None:
    """Semantics: y[t, o] += Σ_j weights[t, j, proj(o)] · (Δ_{slot(t, j)} · x[t])[o].

    In place. The sum over j is taken in fp32 in the order of the row's slots, each member's product
    first and then its weight (which is applied to the accumulator, not to x); the result is added
    to y once. Rows without members keep their bits. A member whose weight is 0, and a member that
    has no delta here, is masked: nothing of it is computed into the row, not even 0 · NaN.

    A row's delta term does not depend, bit for bit, on which rows share the step, on the chunk the
    row is in, or on the number of threads.

    Args:
        y: [T, out_features], the base product; last dimension contiguous. "cpu": float32.
        x: [T, in_features], last dimension contiguous; same dtype as y. Must not overlap y.
        bound: the weight's resident deltas.
        plan: built from the step's rows; its slots index `bound`.
        weights: float32 [T, M, P], M ≥ plan.members, P the packed projections or 1.
        backend: "triton", "cpu" or "reference".

    Raises:
        ShapeError: a shape, dtype or stride does not fit.
        BackendUnavailableError: see `implementation`.
    """
    if not (plan.is_empty or bound.is_empty):
        implementation(backend, "apply").apply(y, x, bound, plan, weights)


def check(y: Tensor, x: Tensor, bound: BoundDeltas, plan: WorkPlan, weights: Tensor) -> None:
    """Whether the arguments of `apply` fit each other, whatever the backend.

    Raises:
        ShapeError: for the first that does not.
    """
    out_features, _ = bound.shape
    if y.shape != (plan.rows, out_features):
        raise ShapeError("y", f"[{plan.rows}, {out_features}]", tuple(y.shape))
    check_terms(x, bound, plan, weights)


def check_terms(x: Tensor, bound: BoundDeltas, plan: WorkPlan, weights: Tensor) -> None:
    """The same without y.

    Raises:
        ShapeError: for the first that does not fit.
    """
    _, in_features = bound.shape
    if x.shape != (plan.rows, in_features):
        raise ShapeError("x", f"[{plan.rows}, {in_features}]", tuple(x.shape))
    if plan.slots > bound.slots:
        raise ShapeError("bound", f"of at least {plan.slots} slots", bound.slots)
    if weights.ndim != 3 or weights.shape[0] != plan.rows or weights.shape[1] < plan.members:
        expected = f"[{plan.rows}, at least {plan.members}, P]"
        raise ShapeError("weights", expected, tuple(weights.shape))
    if weights.shape[2] not in (1, bound.projections) or weights.dtype is not torch.float32:
        expected = f"float32, with 1 or {bound.projections} projections"
        raise ShapeError("weights", expected, (weights.dtype, tuple(weights.shape)))
