"""Whether a module written otherwise computes what another does: judged by what both answer."""

from __future__ import annotations

import torch
from torch import Tensor

#: Largest difference that rounding explains, relative to the largest number.
ROUNDING = {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}

#: What a module raises that is called in a way it does not know. `torch.OutOfMemoryError` is one
#: of them, a RuntimeError, and says nothing about the module.
MISFITS = (TypeError, AttributeError, KeyError, ValueError, IndexError, RuntimeError)


def alike(actual: object, wanted: object) -> bool:
    """Whether two results are tensors of one shape that differ by no more than rounding.

    Not the results of a dtype that `ROUNDING` does not know, nor any that are not finite.
    """
    if not isinstance(actual, Tensor) or not isinstance(wanted, Tensor):
        return False
    if actual.shape != wanted.shape or wanted.dtype not in ROUNDING:
        return False
    difference = (actual - wanted).abs().max()
    return bool(difference.isfinite() & (difference <= ROUNDING[wanted.dtype] * wanted.abs().max()))
