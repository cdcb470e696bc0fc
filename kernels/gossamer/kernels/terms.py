"""What deltas add to a product, between the kernel that computes it and the one that adds it.

On a device the terms are computed beside the product they belong to, and whoever reads the product
next adds them: a launch that only added them would wait for both.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from gossamer.kernels.backends import Backend, implementation
from gossamer.kernels.delta import BoundDeltas
from gossamer.kernels.errors import BackendUnavailableError, ShapeError
from gossamer.kernels.plan import WorkPlan


@dataclass(frozen=True, eq=False, slots=True)
class Terms:
    """The terms of a step's rows for one product.

    Attributes:
        values: float32 [T, out]; those of a row without members hold anything.
        touched: int64 [T], not 0 for the rows that have members.
    """

    values: Tensor
    touched: Tensor

    def add_to(self, y: Tensor) -> None:
        """y [T, out] += the terms, rounded once, by a launch of its own; other rows keep theirs.

        Raises:
            ShapeError: y has another shape.
            BackendUnavailableError: see `implementation`.
        """
        implementation("triton", "rows").add_terms(y, checked(self, y, "triton"))

    def added_to(self, y: Tensor) -> Tensor:
        """y [T, out] with the terms, rounded once; what a kernel that takes terms begins with."""
        whole = (y.float() + self.values).to(y.dtype)
        return whole.where(self.touched[:, None] != 0, y)


def compute_terms(
    x: Tensor, bound: BoundDeltas, plan: WorkPlan, weights: Tensor, backend: Backend = "triton"
) -> Terms:
    """Semantics: what `apply` would add to the product of x.

    Args:
        x, bound, plan, weights: as for `apply`.
        backend: "triton".

    Raises:
        ShapeError: a shape, dtype or stride does not fit.
        BackendUnavailableError: the backend adds terms to the product at once (`apply`).
    """
    if backend != "triton":
        raise BackendUnavailableError(backend, "it has no terms apart from `apply`")
    values: Tensor = implementation(backend, "apply").terms(x, bound, plan, weights)
    return Terms(values, plan.touched)


def checked(terms: Terms | None, y: Tensor, backend: Backend) -> Terms | None:
    """The terms, if they are those of a product y [T, out] that `backend` can add.

    Raises:
        ShapeError: they are of another shape, or the backend adds none.
    """
    if terms is not None and (backend == "cpu" or terms.values.shape != y.shape):
        expected = f"of shape {tuple(y.shape)}, on a device"
        raise ShapeError("terms", expected, (backend, tuple(terms.values.shape)))
    return terms
