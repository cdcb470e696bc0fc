"""Bringing adapters into memory beside the step, and saying what a mix needs there.

A loader thread asks the source for a digest (or compiles a mix) and packs it into the device's
layout; the engine's thread takes the result in when there is room. The step waits for none of it. A
load begins when its request is submitted, not when the step under way ends: that saves half a step
of the first token's time, on average.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Collection, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass
from functools import lru_cache
from typing import Protocol

from gossamer.engine.adapters import Packed
from gossamer.engine.errors import (
    AdapterTooLarge,
    AdapterUnavailable,
    DeviceFull,
    EngineError,
    Overloaded,
)
from gossamer.engine.frames import Move, Run
from gossamer.engine.memory import Memory
from gossamer.merge import Mix, compile_mix, method_named
from gossamer.store.delta import DeltaSet

#: digest → decoded deltas; called in a loader thread; any exception makes the adapter unavailable.
Source = Callable[[str], DeltaSet]
#: key and how to decode it → packed for the kernels; called in a loader thread.
Pack = Callable[[str, Callable[[], DeltaSet]], Packed]


class Placement(Protocol):
    """How packed adapters get to where the kernels read them, when that is elsewhere."""

    def move(self, moves: Sequence[Move]) -> None:
        """Copy frames aside. In the engine's thread, between two steps."""

    def place(self, key: str, packed: Packed, run: Run) -> Packed:
        """Copy an adapter into its frames; it is there when this returns. In a loader thread."""


Applied = tuple[tuple[str, float], ...]

#: Loads between their start and their end. What they have packed lies outside the budget.
_IN_FLIGHT = 2

#: Schedules in which nobody asked for a finished load before it is dropped. More than one, because
#: its request may have been submitted after the inbox was last emptied.
_PATIENCE = 3

#: Sizes of adapters that were in memory once; a number each.
_REMEMBERED = 4096


@dataclass(frozen=True)
class Resident(Packed):
    """What an entry holds.

    `applied` is set for a compiled mix: the (key, weight) pairs that a row of it adds.
    """

    applied: Applied = ()

    @classmethod
    def of(cls, packed: Packed, applied: Applied = ()) -> Resident:
        """A packed adapter, or what a mix was compiled to."""
        return cls(packed.deltas, packed.table, packed.sides, packed.buffer, applied)


@dataclass
class _Load:
    """One load, from its start until its result is taken or dropped.

    `result` is set by a loader thread, once. `unasked` counts the schedules, since then, in which
    nobody asked for it; `told` says that a request has been told of its failure.
    """

    result: Resident | EngineError | None = None
    unasked: int = 0
    told: bool = False


@lru_cache(maxsize=4096)
def _as_they_are(mix: Mix) -> Applied:
    """The members and weights of a mix that needs nothing compiled."""
    return compile_mix(mix, {}).members


class Residency:
    """The gate of the scheduler: starts loads, answers whether a mix can run, pins it.

    What finds no room when it has been loaded is dropped and its size remembered, so that it is
    read again only once there is room.
    """

    def __init__(
        self,
        memory: Memory[Resident],
        source: Source,
        pack: Pack,
        executor: Executor,
        wake: Callable[[], None],
        placement: Placement | None = None,
    ) -> None:
        self._memory = memory
        self._source = source
        self._pack = pack
        self._placement = placement
        self._arriving: dict[str, _Load] = {}
        self._executor = executor
        self._wake = wake
        self._loads: dict[str, _Load] = {}
        self._lock = threading.Lock()  # of `_loads`, for `prefetch`
        self._asked: set[str] = set()
        self._sizes: OrderedDict[str, int] = OrderedDict()

    def prefetch(self, mix: Mix) -> None:
        """Start what the mix lacks. From any thread; a hint, that may be dropped."""
        if self._compiles(mix):
            self._start(mix.digest, mix)
        for member in mix.members:
            self._start(member.digest, None)

    # -- what the scheduler asks

    def ready(self, mix: Mix, keep: Collection[str] = ()) -> bool:
        """Whether everything the mix needs is resident; what is missing is brought on its way.

        Args:
            mix: what a waiting request wants to run with.
            keep: keys that requests ahead of it want; they are not evicted for this one.

        Raises the `EngineError` that a load ended with.
        """
        if not mix.members:
            return True
        self._receive()
        if self._compiles(mix) and not self._present(mix.digest, mix, keep):
            return False
        keys = [key for key, _ in self.applied(mix)]
        keep = {*keep, *keys}
        present = [self._present(key, None, keep) for key in keys]
        self._check_total(mix, keys)
        return all(present)

    def wanted(self, mix: Mix) -> list[str]:
        """The keys that the mix needs in memory, as far as that is known."""
        if self._compiles(mix):
            entry = self._memory.get(mix.digest)
            if entry is None:
                return [mix.digest]
            # A compiled mix without a correction is not among what it applies.
            return list({key: None for key, _ in entry.payload.applied} | {mix.digest: None})
        return [key for key, _ in _as_they_are(mix)]

    def pin(self, mix: Mix) -> None:
        """Keep what the mix needs."""
        for key in self.wanted(mix):
            self._memory.pin(key)

    def unpin(self, mix: Mix) -> None:
        """Undo one `pin`."""
        for key in self.wanted(mix):
            self._memory.unpin(key)

    # -- what the runner asks

    def applied(self, mix: Mix) -> Applied:
        """The (key, weight) pairs that a row of this mix adds, in their fixed order."""
        if not self._compiles(mix):
            return _as_they_are(mix)
        return self.resident(mix.digest).applied

    def resident(self, key: str) -> Resident:
        """A pinned entry's deltas."""
        entry = self._memory.get(key)
        if entry is None:
            raise RuntimeError(f"{key} is used but not resident")
        return entry.payload

    # -- what the loop does once a step

    @property
    def idle(self) -> bool:
        """Whether nothing is being loaded and nothing that was loaded waits to be taken in."""
        return not self._loads and not self._arriving

    @property
    def has_news(self) -> bool:
        """Whether a load has ended that nobody has asked for since."""
        if any(load.result is not None for load in self._arriving.values()):
            return True
        with self._lock:
            return any(
                load.result is not None and not load.unasked for load in self._loads.values()
            )

    def settle(self) -> None:
        """After scheduling: drop what was loaded, or has failed, and nobody asks for any more."""
        self._receive()
        with self._lock:
            ended = [key for key, load in self._loads.items() if load.result is not None]
            for key in ended:
                load = self._loads[key]
                load.unasked += key not in self._asked
                # A failure is seen by everyone who waits for it in one schedule; the next request
                # tries again. One that has come since they asked waits for the next schedule.
                if load.told or load.unasked >= _PATIENCE:
                    del self._loads[key]
        self._asked.clear()

    def no_room(self, mix: Mix) -> EngineError:
        """Why a request cannot start although nothing runs and nothing is being loaded."""
        available = self._memory.available_bytes()
        for key in self.wanted(mix):
            if self._memory.get(key) is None and self._sizes.get(key, 0) > available:
                return AdapterTooLarge(key, self._sizes[key], available)
        return Overloaded("There is no memory for this request's keys and values.", 1.0)

    # -- inside

    @staticmethod
    def _compiles(mix: Mix) -> bool:
        return len(mix.members) > 1 and method_named(mix.method).combine is not None

    def _present(self, key: str, mix: Mix | None, keep: Collection[str]) -> bool:
        self._asked.add(key)
        entry = self._memory.get(key)
        if entry is not None:
            self._memory.touch(entry)
            return key not in self._arriving
        load = self._loads.get(key)
        if load is None:
            if self._memory.available_bytes(keep) >= self._sizes.get(key, 0):
                self._start(key, mix)
            return False
        if isinstance(load.result, EngineError):
            load.told = True
            raise load.result
        return load.result is not None and self._take_in(key, load.result, keep)

    def _start(self, key: str, mix: Mix | None) -> None:
        with self._lock:
            known = key in self._loads or self._memory.get(key) is not None
            if not known and len(self._loads) < _IN_FLIGHT:
                self._loads[key] = load = _Load()
                self._executor.submit(self._attempt, key, load, lambda: self._brought(key, mix))

    def _take_in(self, key: str, resident: Resident, keep: Collection[str]) -> bool:
        nbytes = resident.nbytes
        self._sizes[key] = nbytes
        self._sizes.move_to_end(key)
        if len(self._sizes) > _REMEMBERED:
            self._sizes.popitem(last=False)
        with self._lock:
            del self._loads[key]
        if nbytes > self._memory.total_bytes:
            raise AdapterTooLarge(key, nbytes, self._memory.total_bytes)
        if not self._memory.add(key, resident, nbytes, keep):
            return False
        return self._placement is None or self._sent(key, resident, self._placement)

    def _sent(self, key: str, resident: Resident, placement: Placement) -> bool:
        """Have an adapter copied into its frames, where it stays meanwhile. False: it is not there
        yet."""
        placement.move(self._memory.take_moves())
        entry = self._memory.get(key)
        if entry is None or entry.run is None:
            return True  # nothing to be copied
        run = entry.run

        def place() -> Resident:
            return Resident.of(placement.place(key, resident, run), resident.applied)

        self._memory.pin(key)
        self._arriving[key] = load = _Load()
        self._executor.submit(self._attempt, key, load, place)
        return False

    def _receive(self) -> None:
        """Take note of what has arrived in its frames."""
        for key, load in list(self._arriving.items()):
            if load.result is None:
                continue
            del self._arriving[key]
            self._memory.unpin(key)
            entry = self._memory.get(key)
            if isinstance(load.result, EngineError):
                self._memory.remove(key)
                with self._lock:  # whoever waits for it is told
                    self._loads[key] = load
            elif entry is not None:
                entry.payload = load.result

    def _check_total(self, mix: Mix, keys: list[str]) -> None:
        """A mix whose members do not fit together would evict its own members for ever."""
        if len(keys) > 1:
            total = sum(self._sizes.get(key, 0) for key in keys)
            if total > self._memory.total_bytes:
                raise AdapterTooLarge(f"mix {mix.digest}", total, self._memory.total_bytes)

    def _attempt(self, key: str, load: _Load, make: Callable[[], Resident]) -> None:
        """In a loader thread: what a request waits for, or why it is not to be had."""
        try:
            load.result = make()
        except BaseException as cause:  # noqa: BLE001 - a panic in a native library is its own too
            self._memory.counts.load_failures += 1
            load.result = cause if isinstance(cause, DeviceFull) else AdapterUnavailable(key, cause)
        self._wake()

    def _brought(self, key: str, mix: Mix | None) -> Resident:
        """In a loader thread: one adapter read and packed, or a mix compiled from its members."""
        if mix is None:
            return Resident.of(self._pack(key, lambda: self._source(key)))
        compiled = compile_mix(mix, {m.digest: self._source(m.digest) for m in mix.members})
        deltas = compiled.replaces or compiled.correction
        if deltas is None:
            return Resident({}, applied=compiled.members)
        return Resident.of(self._pack(key, lambda: deltas), (*compiled.members, (key, 1.0)))
