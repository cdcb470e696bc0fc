"""The base's products by torch."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def linear(x: Tensor, weight: Tensor, transposed: bool, bias: Tensor | None) -> Tensor:
    """See `gossamer.kernels.linear`."""
    if not transposed:
        return F.linear(x, weight, bias)
    return torch.mm(x, weight) if bias is None else torch.addmm(bias, x, weight)
