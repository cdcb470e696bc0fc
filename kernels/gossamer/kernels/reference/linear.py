"""The base's products by torch."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def linear(x: Tensor, weight: Tensor, transposed: bool) -> Tensor:
    """See `gossamer.kernels.linear`."""
    return torch.mm(x, weight) if transposed else F.linear(x, weight)
