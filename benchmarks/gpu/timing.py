"""How long launches take, with caches that hold nothing of what they read."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
from torch import Tensor

from gossamer.kernels import Program, program_pool

Launch = Callable[[], Tensor]

#: Launches of a graph that is timed, and about how long it is to take.
_LAUNCHES, _GRAPH_MS = 16, 20.0
#: Clock cycles of a millisecond, about.
_CYCLES = 2_000_000


class Timer:
    """Medians in milliseconds; on a card by events, in the interpreter by the clock.

    Between launches a large buffer is read: the base's weights do that in a decode step. It is read
    and not written over, since what has been written would have to leave the cache at the cost of
    the launch that is timed.
    """

    def __init__(self, device: torch.device, repetitions: int, sweep_bytes: int) -> None:
        self._on_card = device.type == "cuda"
        self._repetitions = repetitions
        self._swept = torch.zeros(sweep_bytes // 4, device=device)
        self._sum = torch.zeros((), device=device)
        self._sweeps: dict[int, Program] = {}

    def launched(self, *functions: Launch) -> float:
        """Milliseconds of one call, launched by a graph, each call after a sweep of the cache.

        The graph takes the functions in turn; the time of as many sweeps alone is subtracted. So a
        launch counts as it does in the middle of a graph, not as a first one does.
        """
        if not self._on_card:
            return self._by_clock(functions)
        once = self._once(functions[0])
        count = max(len(functions), min(_LAUNCHES, int(_GRAPH_MS / max(once, 0.01))))
        chosen = [functions[i % len(functions)] for i in range(count)]
        sweeps = self._sweeps.get(count)
        if sweeps is None:
            sweeps = self._sweeps[count] = program_pool("triton").capture(
                lambda: self._swept_after([None] * count)
            )
        work = program_pool("triton").capture(lambda: self._swept_after(chosen))
        found = [
            (_elapsed(work.replay) - _elapsed(sweeps.replay)) / count
            for _ in range(self._repetitions)
        ]
        return max(statistics.median(found), 1e-4)

    def started(
        self, function: Callable[[], object], between: Callable[[], object] | None = None,
        ahead: float = 2.0,
    ) -> float:  # fmt: skip
        """Milliseconds on the device of what no graph can hold.

        Args:
            function: is timed.
            between: undoes it, before the next.
            ahead: milliseconds that the device idles while the host starts the function. A host
                that needs longer is timed, too.
        """
        found = []
        for turn in range(self._repetitions + 1):
            if self._on_card:
                self._sweep()
                torch.cuda._sleep(int(ahead * _CYCLES))  # noqa: SLF001 - as torch's own benchmarks do
                taken = _elapsed(function)
            else:
                taken = _clocked(function)
            found += [taken] if turn else []  # the first compiles
            if between is not None:
                between()
        return statistics.median(found)

    def waited(self, function: Callable[[], object]) -> float:
        """Milliseconds by the host's clock: started, and waited for."""

        def whole() -> None:
            function()
            if self._on_card:
                torch.cuda.synchronize()

        whole()
        return statistics.median(_clocked(whole) for _ in range(self._repetitions))

    def _sweep(self) -> None:
        torch.sum(self._swept, dim=0, out=self._sum)

    def _swept_after(self, functions: Sequence[Launch | None]) -> Tensor:
        for function in functions:
            self._sweep()
            if function is not None:
                function()
        return self._sum

    def _once(self, function: Launch) -> float:
        function()  # compiles
        return _elapsed(function)

    def _by_clock(self, functions: Sequence[Launch]) -> float:
        found = [_clocked(functions[i % len(functions)]) for i in range(self._repetitions)]
        return statistics.median(found)


def _elapsed(function: Callable[[], object]) -> float:
    """By events on the present stream."""
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    function()
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end))


def _clocked(function: Callable[[], object]) -> float:
    start = time.perf_counter()
    function()
    return 1e3 * (time.perf_counter() - start)


def repeated(function: Callable[[], object], count: int, on_card: bool) -> list[float]:
    """Milliseconds of each of `count` calls in a row, which the host queues without waiting."""
    if not on_card:
        return [_clocked(function) for _ in range(count)]
    events = [torch.cuda.Event(enable_timing=True) for _ in range(count + 1)]
    events[0].record()
    for event in events[1:]:
        function()
        event.record()
    events[-1].synchronize()
    return [before.elapsed_time(after) for before, after in pairwise(events)]
