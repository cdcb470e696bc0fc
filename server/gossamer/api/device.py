"""What the base runs on: device, dtype, whose kernels; and how much memory is left for the rest."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from gossamer.api.settings import Settings
from gossamer.base.errors import ExplainedError
from gossamer.base.load import BaseFiles, stored_dtype
from gossamer.kernels import Backend
from gossamer.kernels.gpu.flash import why_not

#: What a CPU gives to KV pages and adapters when nobody says.
HOST_BYTES = 4 << 30
#: Of a device's free memory: what KV pages and adapters may take, once graphs and workspaces have
#: theirs. The last tenth is for what the allocator cannot use.
FREE_SHARE = 0.9
WORKSPACE_BYTES = 1 << 30

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class DeviceError(ExplainedError):
    """The base cannot run on what the settings ask for."""


@dataclass(frozen=True)
class Device:
    """What the base runs on."""

    device: torch.device
    dtype: torch.dtype
    kernels: Backend


def choose_device(settings: Settings, base: BaseFiles) -> Device:
    """What the settings ask for, or the best there is.

    On a device a base runs in 16 bits: those of its files, or bfloat16 if it has more. On a CPU it
    runs in float32, the only type that the CPU's kernels have.

    Raises:
        DeviceError: there is no such device, or its kernels have no such type.
        CorruptBaseError, UnsupportedBaseError: see `stored_dtype`.
    """
    name = settings.device
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cpu":
        if settings.dtype not in ("auto", "float32"):
            raise DeviceError(
                f"The base cannot run in {settings.dtype} on a CPU",
                "the CPU's kernels compute in float32",
                "Leave GOSSAMER_DTYPE at auto, or set GOSSAMER_DEVICE=cuda",
            )
        return Device(torch.device("cpu"), torch.float32, "cpu")
    if not torch.cuda.is_available():
        raise DeviceError(
            "The base cannot run on a GPU",
            "torch finds no CUDA or ROCm device",
            "Set GOSSAMER_DEVICE=cpu, or install the driver and a build of torch for it",
        )
    dtype = _DTYPES.get(settings.dtype)
    if dtype is None:
        dtype = stored_dtype(base.path)
        dtype = torch.bfloat16 if dtype is torch.float32 else dtype
    return Device(torch.device("cuda", torch.cuda.current_device()), dtype, "triton")


def check_attention(settings: Settings, chosen: Device, head_dim: int | None = None) -> None:
    """Refuse an attention that cannot be had; nothing replaces what an operator has chosen.

    Args:
        head_dim: width of the base's heads; None before that is known.

    Raises:
        DeviceError: FlashInfer is wanted, and there is no GPU for it, it is not installed, or it
            does not take this base.
    """
    if settings.attention != "flashinfer":
        return
    reason: str | None = "FlashInfer needs a GPU, and the base runs on a CPU"
    if chosen.kernels == "triton":
        reason = why_not(chosen.dtype, head_dim)
    if reason is not None:
        raise DeviceError(
            "The base cannot run with FlashInfer's attention",
            reason,
            "Correct that, or leave --attention (GOSSAMER_ATTENTION) at triton",
        )


def memory_budget(settings: Settings, device: torch.device) -> int:
    """Bytes for KV pages and adapters together; on a device asked after the base was loaded.

    Raises:
        DeviceError: the base leaves none.
    """
    if settings.memory_bytes is not None:
        return settings.memory_bytes
    if device.type == "cpu":
        return HOST_BYTES
    free, _ = torch.cuda.mem_get_info(device)
    return share_of(free)


def share_of(free: int) -> int:
    """Of so many free bytes on a device, those for KV pages and adapters.

    Raises:
        DeviceError: there are too few.
    """
    budget = int(FREE_SHARE * free) - WORKSPACE_BYTES
    if budget <= 0:
        raise DeviceError(
            "The device has no room for KV pages and adapters",
            f"{free >> 20} MiB are free beside the base",
            "Take a smaller base, or a device with more memory",
        )
    return budget
