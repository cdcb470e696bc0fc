"""What lies between the products of a layer, one pass over memory each."""

from __future__ import annotations

from torch import Tensor

from gossamer.kernels.backends import Backend, implementation
from gossamer.kernels.errors import ShapeError
from gossamer.kernels.terms import Terms, checked


def rms_norm(x: Tensor, weight: Tensor, eps: float, backend: Backend = "cpu") -> Tensor:
    """Semantics: y[t] = weight · x[t] / sqrt(mean(x[t]²) + eps).

    Args:
        x: [rows, width], rows contiguous. "cpu": float32.
        weight: [width], contiguous, in x's dtype.
        eps: added to the mean square.
        backend: "triton", "cpu" or "reference".

    Returns:
        [rows, width], contiguous.

    Raises:
        ShapeError: a shape, dtype or stride does not fit.
        BackendUnavailableError: see `implementation`.

    Source: Zhang and Sennrich, Root Mean Square Layer Normalization (2019).
    """
    if x.dim() != 2 or weight.shape != x.shape[1:]:
        raise ShapeError("x", f"[rows, {len(weight)}]", tuple(x.shape))
    y: Tensor = implementation(backend, "elementwise").rms_norm(x, weight, eps)
    return y


def fused_add_rms_norm(
    residual: Tensor,
    x: Tensor,
    weight: Tensor,
    eps: float,
    backend: Backend = "cpu",
    terms: Terms | None = None,
) -> Tensor:
    """Semantics: residual += x, in place; then `rms_norm` of it. With `terms`, x has them added.

    Args:
        residual: [rows, width], rows contiguous.
        x: [rows, width], contiguous.
        weight, eps, backend: as for `rms_norm`.
        terms: of the product x; "triton" only.

    Returns:
        [rows, width], contiguous.

    Raises:
        ShapeError: a shape, dtype or stride does not fit.
        BackendUnavailableError: see `implementation`.
    """
    if residual.dim() != 2 or x.shape != residual.shape or weight.shape != x.shape[1:]:
        raise ShapeError("x", f"{list(residual.shape)}, and a weight of its width", tuple(x.shape))
    y: Tensor = implementation(backend, "elementwise").fused_add_rms_norm(
        residual, x, weight, eps, checked(terms, x, backend)
    )
    return y


def silu_and_mul(gate_up: Tensor, backend: Backend = "cpu", terms: Terms | None = None) -> Tensor:
    """Semantics: y[t, i] = silu(g[t, i]) · u[t, i], g and u the left and right half of a row.

    Args:
        gate_up: [rows, 2 * width], rows contiguous. "cpu": float32. With `terms`, they are added
            first.
        backend: "triton", "cpu" or "reference".
        terms: of the product gate_up; "triton" only.

    Returns:
        [rows, width], contiguous.

    Raises:
        ShapeError: a shape, dtype or stride does not fit.
        BackendUnavailableError: see `implementation`.
    """
    if gate_up.dim() != 2 or gate_up.shape[1] % 2:
        raise ShapeError("gate_up", "[rows, 2 * width]", tuple(gate_up.shape))
    y: Tensor = implementation(backend, "elementwise").silu_and_mul(
        gate_up, checked(terms, gate_up, backend)
    )
    return y
