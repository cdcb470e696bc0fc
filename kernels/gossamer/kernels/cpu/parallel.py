"""Runs a compiled kernel on all threads of the OpenMP team that torch uses.

A kernel is a numba-compiled C function of one argument, the address of a *descriptor*: an array of
int64 that holds sizes, strides and addresses. All threads get the same descriptor and draw their
work from a counter inside it (`simd.fetch_add`), so a thread that comes late, or shares its core
with another process, just draws less.

Why not numba's own `parallel=True`: its `omp` layer binds to the system's libgomp while torch ships
and loads its own copy. Two runtimes mean two teams of threads, and each spins for a while after its
region, on the cores that the other needs: alternating with torch.mm on 2 cores, an empty call adds
about 20 µs, and 3 µs here. `GOMP_parallel`, found in the process among the symbols that torch has
loaded, starts the very team that ran the product before.
Where no such runtime is loaded (macOS, Windows) kernels run on the calling thread.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import struct
import threading
from array import array
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from numba import cfunc, njit
from torch import Tensor

#: A function that kernels call: no entry points of its own, so it compiles in half the time.
_SUBROUTINE: dict[str, Any] = {
    "error_model": "numpy",
    "no_cpython_wrapper": True,
    "no_cfunc_wrapper": True,
}
subroutine: Any = njit(**_SUBROUTINE)

#: The first words of a descriptor made by `counted`, byte offsets: the next item to draw, the next
#: thread's seat, and a flag that a kernel sets when an index lies outside its memory.
TICKET, SEATS, FAILED, FIELDS = range(0, 4 * 8, 8)


@functools.cache
def _fingerprint() -> str:
    """A digest of what compiles into the kernels: this package, and the constants it shares."""
    here = Path(__file__).parent
    sources = [*sorted(here.glob("*.py")), here.parent / "layout.py", here.parent / "plan.py"]
    digest = hashlib.sha256()
    for source in sources:
        digest.update(source.read_bytes())
    return digest.hexdigest()[:16]


class Kernel:
    """A function of one descriptor address, compiled at its first launch (or by `compile`).

    Machine code is kept in numba's disk cache. numba notices when the file of the function itself
    has changed, not when a subroutine in another file has; the name under which it is cached
    therefore carries a digest of all of them.
    """

    def __init__(self, function: Callable[[int], None]) -> None:
        self._function: Any = function
        self._function.__qualname__ += f"_{_fingerprint()}"
        self._lock = threading.Lock()
        self._compiled: Any = None
        self._call: Any = None
        self.address = 0
        self.__doc__ = function.__doc__

    def compile(self) -> None:
        """Compiles the kernel unless that has been done; safe from any thread."""
        with self._lock:
            if self.address:
                return
            self._compiled = self._build()
            self._call = ctypes.CFUNCTYPE(None, ctypes.c_int64)(self._compiled.address)
            self.address = self._compiled.address

    def _build(self) -> Any:
        try:
            return cfunc("void(int64)", error_model="numpy", cache=True)(self._function)
        except RuntimeError:  # neither __pycache__ nor the user's cache folder can be written
            return cfunc("void(int64)", error_model="numpy")(self._function)

    def launch(self, descriptor: array[int], threads: int) -> None:
        """Runs the kernel on `threads` threads and returns when all have ended.

        The GIL is released meanwhile. The descriptor must keep its memory until then, and so must
        everything that it points to.
        """
        if not self.address:
            self.compile()
        if _capture.launches is not None:
            _capture.launches.append((self.address, array("q", descriptor)))
        start = _team() if threads > 1 else None
        if start is None:
            self._call(descriptor.buffer_info()[0])
        else:
            start(self.address, descriptor.buffer_info()[0], threads, 0)


@functools.cache
def _team() -> Any:
    """`GOMP_parallel(function, argument, threads, flags)` of the runtime that torch has loaded."""
    try:
        start = ctypes.CDLL(None).GOMP_parallel
    except (AttributeError, OSError, TypeError):
        return None
    start.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint)
    start.restype = None
    return start


def team_barrier() -> int:
    """Address of the barrier of the team that runs kernels: a C function without arguments."""
    return ctypes.cast(ctypes.CDLL(None).GOMP_barrier, ctypes.c_void_p).value or 0


def max_threads() -> int:
    """Threads that a kernel may use: torch's own setting, so that the team is never resized."""
    return torch.get_num_threads()


class _Scratch(threading.local):
    buffer = torch.empty(0, dtype=torch.uint8)


_scratch = _Scratch()


def scratch(nbytes: int) -> int:
    """Address of at least `nbytes` of memory, 64-byte aligned, valid until the calling thread's
    next `scratch`. Kept from call to call: a fresh 100 KiB costs 5 µs in page faults."""
    if _scratch.buffer.nbytes < nbytes:
        _scratch.buffer = torch.empty(nbytes, dtype=torch.uint8)
    return _scratch.buffer.data_ptr()


class _Capture(threading.local):
    launches: list[tuple[int, array[int]]] | None = None


_capture = _Capture()


@contextmanager
def capturing() -> Iterator[list[tuple[int, array[int]]]]:
    """Notes what this thread launches: addresses of kernels, and their descriptors."""
    before, _capture.launches = _capture.launches, []
    try:
        yield _capture.launches
    finally:
        _capture.launches = before


def scratch_buffer() -> Tensor:
    """What the last address that `scratch` gave to this thread points into."""
    return _scratch.buffer


def descriptor(values: Sequence[int]) -> array[int]:
    """A descriptor with the given entries."""
    return array("q", values)


def counted(values: Sequence[int]) -> array[int]:
    """A descriptor whose kernel draws its work: the counters, then the given entries."""
    return array("q", (0, 0, 0, *values))


def float_bits(value: float) -> int:
    """A float as a descriptor entry; `simd.load_f64` reads it."""
    bits: int = struct.unpack("<q", struct.pack("<d", value))[0]
    return bits
