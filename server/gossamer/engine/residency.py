"""Bringing adapters into memory beside the step, and saying what a mix needs there.

A loader thread asks the source for a digest (or compiles a mix), the engine's thread sets room
aside, a loader thread packs it into the device's layout. The step waits for none of it.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from concurrent.futures import Executor
from dataclasses import dataclass
from functools import lru_cache

from gossamer.engine.errors import AdapterTooLarge, AdapterUnavailable, EngineError
from gossamer.engine.memory import Entry, Memory, State
from gossamer.kernels import PackedDelta
from gossamer.merge import Mix, compile_mix, method_named
from gossamer.store.delta import DeltaSet

#: digest → decoded deltas; called in a loader thread; any exception makes the adapter unavailable.
Source = Callable[[str], DeltaSet]
#: decoded deltas → patched weight name → device layout; called in a loader thread.
Pack = Callable[[DeltaSet], dict[str, PackedDelta]]
Applied = tuple[tuple[str, float], ...]

#: Decoded but not yet packed adapters that may exist at once; they lie outside the budget.
_IN_FLIGHT = 2


@dataclass(frozen=True)
class Resident:
    """What an entry holds: deltas in the device's layout, by patched weight.

    `applied` is set for a compiled mix: the (key, weight) pairs that a row of it adds.
    """

    deltas: dict[str, PackedDelta]
    applied: Applied = ()

    @property
    def nbytes(self) -> int:
        """Bytes in memory."""
        return sum(delta.nbytes for delta in self.deltas.values())


@dataclass(frozen=True)
class _Decoded:
    """The first half of a load: what is to be packed, and what a mix was compiled to."""

    deltas: DeltaSet | None
    applied: Applied
    nbytes: int


def _estimate(deltas: DeltaSet | None) -> int:
    """Bytes an adapter will take: 8 an entry and at most a tenth for its tables."""
    if deltas is None:
        return 0
    return sum(9 * d.nnz + 4096 for d in deltas.deltas.values())


@lru_cache(maxsize=4096)
def _as_they_are(mix: Mix) -> Applied:
    """The members and weights of a mix that needs nothing compiled."""
    return compile_mix(mix, {}).members


class Residency:
    """The gate of the scheduler: starts loads, answers whether a mix can run, pins it."""

    def __init__(
        self,
        memory: Memory[Resident],
        source: Source,
        pack: Pack,
        executor: Executor,
        wake: Callable[[], None],
    ) -> None:
        self._memory = memory
        self._source = source
        self._pack = pack
        self._executor = executor
        self._wake = wake
        self._queue: deque[tuple[str, Mix | None]] = deque()
        self._in_flight = 0
        self._arrived: deque[tuple[Entry[Resident], object]] = deque()  # appended by loader threads
        self._parked: list[tuple[Entry[Resident], _Decoded]] = []
        self._reported: list[str] = []

    # -- what the scheduler asks

    def ready(self, mix: Mix) -> bool:
        """Whether everything the mix needs is resident; what is missing starts loading."""
        if not mix.members:
            return True
        if self._compiles(mix) and not self._present(mix.digest, mix):
            return False
        missing = [key for key, _ in self.applied(mix) if not self._present(key, None)]
        return not missing

    def pin(self, mix: Mix) -> None:
        """Keep what the mix needs."""
        for key, _ in self.applied(mix):
            self._memory.pin(key)

    def unpin(self, mix: Mix) -> None:
        """Undo one `pin`."""
        for key, _ in self.applied(mix):
            self._memory.unpin(key)

    # -- what the runner asks

    def applied(self, mix: Mix) -> Applied:
        """The (key, weight) pairs that a row of this mix adds, in their fixed order."""
        if self._compiles(mix):
            entry = self._memory.get(mix.digest)
            if entry is None or entry.payload is None:
                raise RuntimeError(f"mix {mix.digest} is used before it was compiled")
            return entry.payload.applied
        return _as_they_are(mix)

    def resident(self, key: str) -> Resident:
        """A pinned entry's deltas."""
        entry = self._memory.get(key)
        if entry is None or entry.payload is None:
            raise RuntimeError(f"{key} is used but not resident")
        return entry.payload

    # -- what the loop does once a step

    def poll(self) -> None:
        """Take in what the loader threads finished, and hand them what is next."""
        while self._arrived:
            entry, result = self._arrived.popleft()
            if isinstance(result, EngineError):
                self._in_flight -= 1
                self._memory.fail(entry, result)
            elif isinstance(result, _Decoded):
                self._parked.append((entry, result))
            elif isinstance(result, Resident):
                self._in_flight -= 1
                self._memory.finish(entry, result, result.nbytes)
        self._parked = [item for item in self._parked if not self._set_aside(*item)]
        while self._queue and self._in_flight < _IN_FLIGHT:
            key, mix = self._queue.popleft()
            entry = self._memory.get(key) or self._memory.begin(key)
            self._in_flight += 1
            self._executor.submit(self._decode, entry, mix)

    def forget_failures(self) -> None:
        """After every waiting request saw a failure: the next one tries again."""
        for key in self._reported:
            self._memory.clear_failed(key)
        self._reported.clear()

    @property
    def has_news(self) -> bool:
        """Whether a loader thread has finished something that `poll` has not seen."""
        return bool(self._arrived)

    def stuck(self) -> bool:
        """Whether a decoded adapter waits for room."""
        return bool(self._parked)

    def give_up_parked(self) -> None:
        """Nothing runs, so nothing will be unpinned: what found no room cannot be had."""
        for entry, decoded in self._parked:
            self._in_flight -= 1
            available = self._memory.available_bytes()
            self._memory.fail(entry, AdapterTooLarge(entry.key, decoded.nbytes, available))
        self._parked.clear()

    # -- inside

    @staticmethod
    def _compiles(mix: Mix) -> bool:
        return len(mix.members) > 1 and method_named(mix.method).combine is not None

    def _present(self, key: str, mix: Mix | None) -> bool:
        entry = self._memory.get(key)
        if entry is None:
            self._memory.begin(key)
            self._queue.append((key, mix))
            self.poll()
            return False
        if entry.error is not None:
            self._reported.append(key)
            raise entry.error
        if entry.state is State.RESIDENT:
            self._memory.touch(entry)
            return True
        return False

    def _set_aside(self, entry: Entry[Resident], decoded: _Decoded) -> bool:
        try:
            if not self._memory.reserve(entry, decoded.nbytes):
                return False
        except EngineError as error:
            self._in_flight -= 1
            self._memory.fail(entry, error)
            return True
        self._executor.submit(self._make_resident, entry, decoded)
        return True

    def _decode(self, entry: Entry[Resident], mix: Mix | None) -> None:
        """In a loader thread: read one adapter, or compile a mix from its members."""
        result: _Decoded | EngineError
        try:
            if mix is None:
                deltas: DeltaSet | None = self._source(entry.key)
                result = _Decoded(deltas, (), _estimate(deltas))
            else:
                compiled = compile_mix(mix, {m.digest: self._source(m.digest) for m in mix.members})
                deltas = compiled.replaces or compiled.correction
                own = ((entry.key, 1.0),)
                applied = compiled.members + own if deltas is not None else compiled.members
                result = _Decoded(deltas, applied, _estimate(deltas))
        except Exception as cause:  # noqa: BLE001 - whatever the source raised is this adapter's own
            result = AdapterUnavailable(entry.key, cause)
        self._post(entry, result)

    def _make_resident(self, entry: Entry[Resident], decoded: _Decoded) -> None:
        """In a loader thread: pack what was decoded."""
        result: Resident | EngineError
        try:
            packed = self._pack(decoded.deltas) if decoded.deltas is not None else {}
            result = Resident(packed, decoded.applied)
        except Exception as cause:  # noqa: BLE001 - a packing error is this adapter's own
            result = AdapterUnavailable(entry.key, cause)
        self._post(entry, result)

    def _post(self, entry: Entry[Resident], result: object) -> None:
        self._arrived.append((entry, result))
        self._wake()
