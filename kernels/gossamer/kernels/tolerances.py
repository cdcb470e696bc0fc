"""How far a kernel may be from the reference, by dtype. Tests use this table only."""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor

#: Largest error, in units of the largest magnitude in the expected tensor. fp32: a few hundred
#: terms summed in another order; the narrow types: one rounding of the result.
TOLERANCES: Final[dict[torch.dtype, float]] = {
    torch.float32: 5e-6,
    torch.float16: 2e-3,
    torch.bfloat16: 1.6e-2,
}


def deviation(actual: Tensor, expected: Tensor) -> float:
    """Largest error of `actual` over the largest magnitude of `expected`; NaN counts as infinite.

    `expected` may have more precision; an empty tensor deviates by 0.
    """
    if actual.numel() == 0:
        return 0.0
    scale = expected.abs().max().double().clamp_min(torch.finfo(torch.float32).tiny)
    error = float(((actual.double() - expected.double()).abs().max() / scale).item())
    return error if error == error else float("inf")


def agrees(actual: Tensor, expected: Tensor) -> bool:
    """Whether `actual` is within the tolerance of its dtype."""
    return deviation(actual, expected) <= TOLERANCES[actual.dtype]
