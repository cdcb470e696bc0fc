"""Starting Triton kernels: where they can run, how many programs, with which options."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor
from triton import knobs

from gossamer.kernels.errors import BackendUnavailableError, ShapeError
from gossamer.kernels.gpu.variant import options

#: Programs of a persistent grid per multiprocessor. They draw their items by number, so any grid
#: computes the same.
PROGRAMS_PER_SM = 8

#: Names that Triton's signatures give to dtypes.
TYPE_NAMES = {
    torch.float32: "fp32",
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.int64: "i64",
    torch.int32: "i32",
}


def interpreted() -> bool:
    """Whether kernels run in Triton's interpreter, on tensors of the CPU."""
    return bool(knobs.runtime.interpret)


@functools.cache
def programs(device: torch.device) -> int:
    """Programs of a persistent grid."""
    if device.type != "cuda":
        return 2  # the interpreter: one after the other, and two show that they share the work
    return PROGRAMS_PER_SM * torch.cuda.get_device_properties(device).multi_processor_count


def launch(
    kernel: Any,
    grid: int,
    *args: object,
    num_warps: int = 4,
    num_stages: int | None = None,
    max_registers: int | None = None,
    **constants: object,
) -> None:
    """Start a kernel on a one-dimensional grid.

    Triton's contraction of a·b + c is off in every kernel: where one rounding is wanted, the kernel
    says `tl.fma`, so that every variant of it computes the same bits.
    """
    if torch.version.hip is not None:
        max_registers = None
    if grid > 0:
        kernel[(grid,)](*args, **options(num_warps, num_stages, max_registers), **constants)


def require(name: str, tensor: Tensor, like: Tensor | None = None) -> None:
    """Whether a kernel can work on a tensor.

    Raises:
        BackendUnavailableError: it is on the CPU, and kernels are compiled for a device.
        ShapeError: it is elsewhere than `like`, or of another dtype; or of a dtype that the kernels
            do not know.
    """
    if tensor.device.type != "cuda" and not interpreted():
        reason = f"{name} is on {tensor.device}, and Triton's interpreter is off (TRITON_INTERPRET)"
        raise BackendUnavailableError("triton", reason)
    if tensor.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise ShapeError(name, "float32, bfloat16 or float16", tensor.dtype)
    if like is not None and (tensor.device, tensor.dtype) != (like.device, like.dtype):
        expected, got = (like.dtype, like.device), (tensor.dtype, tensor.device)
        raise ShapeError(name, f"{expected[0]} on {expected[1]}", got)
