"""The base's own products."""

from __future__ import annotations

from torch import Tensor

from gossamer.kernels.backends import Backend, implementation
from gossamer.kernels.errors import ShapeError


def linear(
    x: Tensor,
    weight: Tensor,
    transposed: bool = False,
    backend: Backend = "cpu",
    bias: Tensor | None = None,
) -> Tensor:
    """Semantics: y[t, o] = b[o] + Σ_i x[t, i] · W[o, i].

    "cpu": where few rows make the product wait for memory it has a kernel of its own, whose sum for
    a row does not depend on how many rows there are; elsewhere it calls the library.

    Args:
        x: [rows, in].
        weight: (out, in), or (in, out) with `transposed`; the dtype of x.
        transposed: how W is stored.
        backend: "cpu" or "reference".
        bias: [out], contiguous, in x's dtype; None for zeros.

    Returns:
        [rows, out], newly allocated.

    Raises:
        ShapeError: x or W has not two dimensions, or they do not fit, or b does not.
        BackendUnavailableError: see `implementation`.
    """
    if weight.dim() != 2 or x.dim() != 2 or x.shape[1] != weight.shape[0 if transposed else 1]:
        raise ShapeError("x", f"[rows, in] for a weight of {tuple(weight.shape)}", tuple(x.shape))
    outputs = weight.shape[1 if transposed else 0]
    if bias is not None and (bias.shape != (outputs,) or bias.dtype is not x.dtype):
        raise ShapeError("bias", f"{x.dtype} [{outputs}]", (bias.dtype, tuple(bias.shape)))
    y: Tensor = implementation(backend, "linear").linear(x, weight, transposed, bias)
    return y
