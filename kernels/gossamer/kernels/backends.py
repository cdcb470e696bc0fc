"""Which implementation of the kernels runs. The caller chooses; nothing is switched behind it."""

from __future__ import annotations

import functools
import importlib
import importlib.util
from types import ModuleType
from typing import Final, Literal, get_args

import torch

from gossamer.kernels.errors import BackendUnavailableError

Backend = Literal["triton", "cpu", "reference"]

BACKENDS: Final[tuple[Backend, ...]] = get_args(Backend)

#: What a backend imports beyond torch and numpy.
_NEEDS: Final[dict[Backend, str | None]] = {"triton": "triton", "cpu": "numba", "reference": None}

#: Where a backend's modules are. A package called triton would hide Triton's own from its members.
_PACKAGES: Final[dict[Backend, str]] = {"triton": "gpu", "cpu": "cpu", "reference": "reference"}


def available_backends() -> tuple[Backend, ...]:
    """The backends that this process can run, fastest first. `reference` is always among them.

    "triton" is, where there is a device or Triton's interpreter is on.
    """
    return tuple(b for b in BACKENDS if _why_not(b) is None)


def _why_not(backend: Backend) -> str | None:
    """What a backend lacks in this process."""
    needed = _NEEDS[backend]
    if needed is not None and importlib.util.find_spec(needed) is None:
        return f"{needed} is not installed"
    if backend == "triton" and not torch.cuda.is_available():
        interpreted: bool = implementation(backend, "launch").interpreted()
        return None if interpreted else "there is no CUDA or ROCm device"
    return None


@functools.cache
def implementation(backend: Backend, op: str) -> ModuleType:
    """The module that implements `op` for `backend`, imported on first use.

    Raises:
        BackendUnavailableError: the backend is unknown, or what it imports is not installed.
    """
    if backend not in BACKENDS:
        raise BackendUnavailableError(backend, f"there are {', '.join(BACKENDS)}")
    try:
        return importlib.import_module(f"gossamer.kernels.{_PACKAGES[backend]}.{op}")
    except ModuleNotFoundError as error:
        if error.name != _NEEDS[backend]:
            raise
        raise BackendUnavailableError(backend, f"{error.name} is not installed") from error


def warm_up(backend: Backend = "cpu") -> None:
    """Compiles every kernel of a backend, or reads it from the disk cache.

    "reference" has none. Triton compiles a kernel where it is first launched; only the packer's
    loops, which run on the host, are compiled here.

    Takes seconds in the first process after an installation and a fraction of a second later
    (figures in the decision record on the CPU kernels). May run in any thread, beside anything;
    without it the first step pays.

    Raises:
        BackendUnavailableError: see `implementation`.
    """
    if backend == "triton":
        implementation(backend, "packing").warm_up()
    if backend != "cpu":
        return
    for op in ("apply", "attention", "elementwise", "linear", "packing", "program", "scatter"):
        for kernel in getattr(implementation(backend, op), "KERNELS", ()):
            kernel.compile()
