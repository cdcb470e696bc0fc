"""What the compiled kernels require of tensors, since they see addresses only."""

from __future__ import annotations

import torch
from torch import Tensor

from gossamer.kernels.errors import ShapeError


def require_fp32(*tensors: tuple[str, Tensor]) -> None:
    for name, tensor in tensors:
        if tensor.dtype is not torch.float32 or not tensor.is_cpu:
            raise ShapeError(name, "float32 on the CPU", (tensor.dtype, tensor.device))
        if tensor.stride(-1) != 1:
            raise ShapeError(name, "contiguous in its last dimension", tensor.stride())


def require_contiguous(**tensors: Tensor) -> None:
    for name, tensor in tensors.items():
        if not tensor.is_contiguous():
            raise ShapeError(name, "contiguous", tensor.stride())


def require_int32(*tensors: tuple[str, Tensor]) -> None:
    for name, tensor in tensors:
        if tensor.dtype is not torch.int32 or tensor.stride(-1) != 1:
            expected = "int32, contiguous in its last dimension"
            raise ShapeError(name, expected, (tensor.dtype, tensor.stride()))
