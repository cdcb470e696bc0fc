"""Launches recorded as CUDA graphs; in the interpreter, functions called again.

A graph may hold torch's own operations as well, so there is nothing that cannot be captured but a
wait for the device.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from gossamer.kernels.errors import NotCapturableError
from gossamer.kernels.gpu.launch import interpreted

#: Runs before a capture: Triton compiles and libraries choose their algorithms in the first, and
#: neither may happen while a graph is recorded.
_WARM_UPS = 2


class GraphProgram:
    """A captured function; `result` is where it leaves what it returns."""

    def __init__(self, graph: torch.cuda.CUDAGraph, result: Tensor) -> None:
        self._graph = graph
        self.result = result

    def replay(self) -> Tensor:
        """See `gossamer.kernels.program.Program.replay`."""
        self._graph.replay()
        return self.result


class CalledProgram:
    """A function that is called again, its result copied to where the first was."""

    def __init__(self, function: Callable[[], Tensor]) -> None:
        self._function = function
        self.result = function().clone()

    def replay(self) -> Tensor:
        """See `gossamer.kernels.program.Program.replay`."""
        return self.result.copy_(self._function())


class ProgramPool:
    """See `gossamer.kernels.program.ProgramPool`.

    All captures record on one stream of the pool's own, and are preceded by runs on another. cuBLAS
    keeps a workspace for each stream: one stream a capture would leave 32 MiB behind each time, and
    warming up on the recording one would put the workspace of all graphs outside their pool.
    """

    def __init__(self) -> None:
        self._pool: Any = None
        self._streams: tuple[torch.cuda.Stream, torch.cuda.Stream] | None = None
        self.nbytes = 0

    def capture(self, function: Callable[[], Tensor]) -> GraphProgram | CalledProgram:
        """See `gossamer.kernels.program.ProgramPool.capture`. On a device, runs it three times,
        which must leave what running it once does."""
        if interpreted() or not torch.cuda.is_available():
            return CalledProgram(function)
        if self._streams is None:
            self._streams = torch.cuda.Stream(), torch.cuda.Stream()
        warming, recording = self._streams
        current = torch.cuda.current_stream()
        warming.wait_stream(current)
        with torch.cuda.stream(warming):
            for _ in range(_WARM_UPS):
                function()
        current.wait_stream(warming)
        torch.cuda.synchronize()
        before = torch.cuda.memory_reserved()
        graph = torch.cuda.CUDAGraph()
        if self._pool is None:
            self._pool = torch.cuda.graph_pool_handle()
        try:
            # The outer context, because a capture that fails to end leaves its stream current.
            # Loader threads copy adapters meanwhile: theirs is not this thread's capture.
            with (
                torch.cuda.stream(current),
                torch.cuda.graph(
                    graph, pool=self._pool, stream=recording, capture_error_mode="thread_local"
                ),
            ):
                result = function()
        except RuntimeError as error:
            self._pool = None  # it may still count as being recorded to
            full = isinstance(error, torch.OutOfMemoryError)
            why = "it needs more memory than there is" if full else "a wait for the device"
            raise NotCapturableError(f"{why} ({error})") from error
        self.nbytes += max(torch.cuda.memory_reserved() - before, 0)
        program = GraphProgram(graph, result)
        program.replay()  # what is captured does not run
        return program
