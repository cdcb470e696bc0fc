"""What the elementwise kernels mean, in plain torch."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from gossamer.kernels.terms import Terms


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """See `gossamer.kernels.elementwise.rms_norm`."""
    wide = x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
    normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return normed.to(x.dtype) * weight


def fused_add_rms_norm(
    residual: Tensor, x: Tensor, weight: Tensor, eps: float, terms: Terms | None = None
) -> Tensor:
    """See `gossamer.kernels.elementwise.fused_add_rms_norm`."""
    x = x if terms is None else terms.added_to(x)
    return rms_norm(residual.add_(x), weight, eps)


def silu_and_mul(gate_up: Tensor, terms: Terms | None = None) -> Tensor:
    """See `gossamer.kernels.elementwise.silu_and_mul`."""
    gate_up = gate_up if terms is None else terms.added_to(gate_up)
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate) * up
