"""A step's launches in one: no Python between them, one team of threads, a barrier after each.

The barrier is that of the OpenMP runtime that runs the team (see `parallel`), so a thread that
waits long for another one sleeps, as after any parallel region of torch.
"""

from __future__ import annotations

import math
import sys
import weakref
from array import array
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from gossamer.kernels.cpu.parallel import (
    FAILED,
    SEATS,
    TICKET,
    Kernel,
    capturing,
    descriptor,
    max_threads,
    scratch_buffer,
    team_barrier,
)
from gossamer.kernels.cpu.simd import invoke, load_i64, store_i64
from gossamer.kernels.errors import IndexRangeError, NotCapturableError
from gossamer.kernels.layout import ALIGN

LAUNCHES, COUNT, BARRIER = range(0, 3 * 8, 8)


@Kernel
def _replay(d: int) -> None:
    """Runs (kernel, descriptor) pairs one after the other, on every thread of the team."""
    launches, barrier = load_i64(d + LAUNCHES), load_i64(d + BARRIER)
    for i in range(load_i64(d + COUNT)):
        called = load_i64(launches + 16 * i + 8)
        invoke(load_i64(launches + 16 * i), called)
        if barrier != 0:
            invoke(barrier, 0)
        # By every thread: none draws from these again before the next replay, which begins when
        # all have ended.
        store_i64(called + TICKET, 0)
        store_i64(called + SEATS, 0)


KERNELS = (_replay,)

#: What allocates memory and leaves nothing to be done again.
_ALLOCATIONS = (torch.ops.aten.empty.memory_format, torch.ops.aten.zeros.default)


class Arena:
    """Memory for what programs compute on their way; a block returns when its tensor has gone."""

    def __init__(self) -> None:
        self._free: list[NDArray[np.uint8]] = []
        self.nbytes = 0

    def tensor(self, shape: Sequence[int]) -> Tensor:
        """Float32 zeros."""
        nbytes = 4 * math.prod(shape)
        fitting = [i for i, block in enumerate(self._free) if block.nbytes >= nbytes]
        if fitting:
            block = self._free.pop(min(fitting, key=lambda i: self._free[i].nbytes))
        else:
            self.nbytes += nbytes
            block = _aligned(nbytes)
        array = block[:nbytes].view(np.float32).reshape(shape)
        array.fill(0.0)
        # torch holds the array for as long as there is a view of the tensor.
        weakref.finalize(array, self._free.append, block).atexit = False
        return torch.from_numpy(array)


def _aligned(nbytes: int) -> NDArray[np.uint8]:
    memory = np.empty(nbytes + ALIGN, np.uint8)
    start = -memory.ctypes.data % ALIGN
    return memory[start : start + nbytes]


class _Watch(TorchDispatchMode):
    """Allocates from the arena, and refuses what torch computes: a replay would not do it.

    Attributes:
        scratch: buffers that `parallel.scratch` has handed out meanwhile.
    """

    def __init__(self, arena: Arena) -> None:
        super().__init__()
        self._arena = arena
        self.scratch = [scratch_buffer()]

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:  # fmt: skip
        kwargs = kwargs or {}
        if func in _ALLOCATIONS:
            if kwargs.get("dtype", torch.float32) is torch.float32:
                return self._arena.tensor(args[0])
            self.scratch.append(func(*args, **kwargs))
            return self.scratch[-1]
        if not func.is_view:
            raise NotCapturableError(str(func))
        return func(*args, **kwargs)


class Program:
    """See `gossamer.kernels.program.Program`."""

    def __init__(
        self, launches: list[tuple[int, array[int]]], result: Tensor, scratch: list[Tensor]
    ) -> None:
        self.result = result
        self._scratch = scratch
        starts = np.cumsum([0, *(len(d) for _, d in launches[:-1])])
        self._words = np.concatenate([np.asarray(d, np.int64) for _, d in launches])
        self._failed = starts + FAILED // 8
        for offset in (TICKET, SEATS, FAILED):
            self._words[starts + offset // 8] = 0
        addresses = self._words.ctypes.data + 8 * starts
        calls = zip((kernel for kernel, _ in launches), addresses.tolist(), strict=True)
        self._calls = descriptor([word for call in calls for word in call])
        self._threads = max_threads()
        barrier = team_barrier() if self._threads > 1 else 0
        self._descriptor = descriptor((self._calls.buffer_info()[0], len(launches), barrier))

    def replay(self) -> Tensor:
        """See `gossamer.kernels.program.Program.replay`."""
        _replay.launch(self._descriptor, self._threads)
        if self._words[self._failed].any():
            self._words[self._failed] = 0
            raise IndexRangeError("an index of the step", sys.maxsize)
        return self.result


class ProgramPool:
    """See `gossamer.kernels.program.ProgramPool`."""

    def __init__(self) -> None:
        self._arena = Arena()

    @property
    def nbytes(self) -> int:
        """See `gossamer.kernels.program.ProgramPool`."""
        return self._arena.nbytes

    def capture(self, function: Callable[[], Tensor]) -> Program:
        """See `gossamer.kernels.program.ProgramPool`."""
        with capturing() as launches, _Watch(self._arena) as watch:
            result = function()
        if not launches:
            raise NotCapturableError("nothing")
        return Program(launches, result, watch.scratch)
