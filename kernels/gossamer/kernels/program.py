"""Launches recorded once and run again and again on the same memory, as CUDA graphs are."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol, cast

from torch import Tensor

from gossamer.kernels.backends import Backend, implementation
from gossamer.kernels.errors import BackendUnavailableError


class Program(Protocol):
    """What was captured.

    Attributes:
        result: what the function returned; every replay writes it anew.
    """

    result: Tensor

    def replay(self) -> Tensor:
        """Semantics: `result` as the function would compute it from what its inputs hold now.

        The tensors that the function read stay where they were; what is new in them is read.

        Raises:
            IndexRangeError: an index points outside its memory; the result is to be dropped.
        """


class ProgramPool(Protocol):
    """Programs that share the memory of what they compute on their way: one may run at a time.

    Attributes:
        nbytes: what they share, in bytes.
    """

    @property
    def nbytes(self) -> int: ...

    def capture(self, function: Callable[[], Tensor]) -> Program:
        """Semantics: runs `function` once and records what it launched.

        Args:
            function: calls kernels of this package on tensors that live as long as the program. On
                the CPU it may take views and allocate, and nothing else of torch: what torch
                computes would not be computed again. On a device it may compute with torch, but
                not wait for what it computed. Its result must not be one of its inputs.

        Raises:
            NotCapturableError: it did what a program cannot hold. It has then run in part.
        """


def program_pool(backend: Backend = "cpu") -> ProgramPool:
    """An empty pool.

    Raises:
        BackendUnavailableError: see `implementation`; "reference" records nothing.
    """
    if backend == "reference":
        raise BackendUnavailableError(backend, "it computes with torch, and records nothing")
    return cast(ProgramPool, implementation(backend, "program").ProgramPool())
