"""Which implementation of the kernels runs. The caller chooses; nothing is switched behind it."""

from __future__ import annotations

import functools
import importlib
import importlib.util
from types import ModuleType
from typing import Final, Literal, get_args

from gossamer.kernels.errors import BackendUnavailableError

Backend = Literal["cpu", "reference"]

BACKENDS: Final[tuple[Backend, ...]] = get_args(Backend)

#: What a backend imports beyond torch and numpy.
_NEEDS: Final[dict[Backend, str | None]] = {"cpu": "numba", "reference": None}


def available_backends() -> tuple[Backend, ...]:
    """The backends that this process can run, fastest first. `reference` is always among them."""
    return tuple(b for b in BACKENDS if (n := _NEEDS[b]) is None or importlib.util.find_spec(n))


@functools.cache
def implementation(backend: Backend, op: str) -> ModuleType:
    """The module that implements `op` for `backend`, imported on first use.

    Raises:
        BackendUnavailableError: the backend is unknown, or what it imports is not installed.
    """
    if backend not in BACKENDS:
        raise BackendUnavailableError(backend, f"there are {', '.join(BACKENDS)}")
    try:
        return importlib.import_module(f"gossamer.kernels.{backend}.{op}")
    except ModuleNotFoundError as error:
        if error.name != _NEEDS[backend]:
            raise
        raise BackendUnavailableError(backend, f"{error.name} is not installed") from error


def warm_up(backend: Backend = "cpu") -> None:
    """Compiles every kernel of a backend, or reads it from the disk cache; "reference" has none.

    Takes seconds in the first process after an installation and a fraction of a second later
    (figures in the decision record on the CPU kernels). May run in any thread, beside anything;
    without it the first step pays.

    Raises:
        BackendUnavailableError: see `implementation`.
    """
    if backend == "reference":
        return
    for op in ("apply", "attention", "elementwise", "linear", "packing", "program", "scatter"):
        for kernel in getattr(implementation(backend, op), "KERNELS", ()):
            kernel.compile()
