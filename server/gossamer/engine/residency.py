"""Bringing adapters into memory beside the step, and saying what a mix needs there.

A loader thread asks the source for a digest (or compiles a mix), the engine's thread sets room
aside, a loader thread packs it into the device's layout. The step waits for none of it.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Callable, Collection
from concurrent.futures import Executor
from dataclasses import dataclass
from functools import lru_cache

from gossamer.engine.errors import AdapterTooLarge, AdapterUnavailable, EngineError, Overloaded
from gossamer.engine.memory import Entry, Memory, State
from gossamer.kernels import PackedDelta
from gossamer.merge import Mix, compile_mix, method_named
from gossamer.store.delta import DeltaSet

#: digest → decoded deltas; called in a loader thread; any exception makes the adapter unavailable.
Source = Callable[[str], DeltaSet]
#: decoded deltas → patched weight name → device layout; called in a loader thread.
Pack = Callable[[DeltaSet], dict[str, PackedDelta]]
Applied = tuple[tuple[str, float], ...]

#: Loads between their start and their end. What they have decoded lies outside the budget.
_IN_FLIGHT = 2

#: Sizes of adapters that were in memory once; a number each.
_REMEMBERED = 4096


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
    """Bytes an adapter will take, nearly: 8 an entry, and the tables of each weight."""
    if deltas is None:
        return 0
    return sum(8 * d.nnz + 1024 for d in deltas.deltas.values())


@lru_cache(maxsize=4096)
def _as_they_are(mix: Mix) -> Applied:
    """The members and weights of a mix that needs nothing compiled."""
    return compile_mix(mix, {}).members


class Residency:
    """The gate of the scheduler: starts loads, answers whether a mix can run, pins it.

    A load moves on only when a waiting request asks for it (`ready`): decoded in a loader thread,
    then room is set aside, then packed. What finds no room is dropped and its size remembered, so
    that it is read again only once there is room; nothing lies about half loaded.
    """

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
        self._in_flight = 0
        self._arrived: deque[tuple[Entry[Resident], object]] = deque()  # appended by loader threads
        self._decoded: dict[str, _Decoded] = {}
        self._sizes: OrderedDict[str, int] = OrderedDict()
        self._failed: list[str] = []
        self._failed_before: list[str] = []

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
            if entry is None or entry.payload is None:
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
        if entry is None or entry.payload is None:
            raise RuntimeError(f"{key} is used but not resident")
        return entry.payload

    # -- what the loop does once a step

    @property
    def has_news(self) -> bool:
        """Whether a loader thread has finished something that `poll` has not seen."""
        return bool(self._arrived)

    @property
    def idle(self) -> bool:
        """Whether nothing is being loaded."""
        return not self._in_flight

    def poll(self) -> None:
        """Before scheduling: take in what the loader threads have finished."""
        while self._arrived:
            entry, result = self._arrived.popleft()
            if isinstance(result, _Decoded):
                self._decoded[entry.key] = result
                continue
            self._in_flight -= 1
            if isinstance(result, Resident) and self._fits(entry, result):
                self._memory.finish(entry, result, result.nbytes)
            elif isinstance(result, EngineError):
                self._fail(entry, result)

    def settle(self) -> None:
        """After scheduling: drop what nobody asks for any more, and failures that were seen."""
        for key in list(self._decoded):
            self._drop(key)
        for key in self._failed_before:
            self._memory.clear_failed(key)
        self._failed_before, self._failed = self._failed, []

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
        entry = self._memory.get(key)
        if entry is None:
            self._start(key, mix, keep)
        elif entry.error is not None:
            raise entry.error
        elif entry.state is State.RESIDENT:
            self._memory.touch(entry)
            return True
        elif key in self._decoded:
            self._set_aside(entry, keep)
        return False

    def _start(self, key: str, mix: Mix | None, keep: Collection[str]) -> None:
        size = self._sizes.get(key, 0)
        if self._in_flight < _IN_FLIGHT and self._memory.available_bytes(keep) >= size:
            self._in_flight += 1
            self._executor.submit(self._decode, self._memory.begin(key), mix)

    def _set_aside(self, entry: Entry[Resident], keep: Collection[str]) -> None:
        decoded = self._decoded[entry.key]
        self._remember(entry.key, decoded.nbytes)
        if decoded.nbytes > self._memory.total_bytes:
            self._drop(entry.key)
            raise AdapterTooLarge(entry.key, decoded.nbytes, self._memory.total_bytes)
        if self._memory.reserve(entry, decoded.nbytes, keep):
            del self._decoded[entry.key]
            self._executor.submit(self._make_resident, entry, decoded)

    def _check_total(self, mix: Mix, keys: list[str]) -> None:
        """A mix whose members do not fit together would evict its own members for ever."""
        if len(keys) > 1:
            total = sum(self._sizes.get(key, 0) for key in keys)
            if total > self._memory.total_bytes:
                raise AdapterTooLarge(f"mix {mix.digest}", total, self._memory.total_bytes)

    def _fits(self, entry: Entry[Resident], resident: Resident) -> bool:
        """Whether the packed form, should it be larger than estimated, finds room after all."""
        self._remember(entry.key, resident.nbytes)
        if self._memory.make_room(max(0, resident.nbytes - entry.nbytes)):
            return True
        available = self._memory.available_bytes()
        self._fail(entry, AdapterTooLarge(entry.key, resident.nbytes, available))
        return False

    def _remember(self, key: str, nbytes: int) -> None:
        self._sizes[key] = nbytes
        self._sizes.move_to_end(key)
        if len(self._sizes) > _REMEMBERED:
            self._sizes.popitem(last=False)

    def _drop(self, key: str) -> None:
        decoded = self._decoded.pop(key)
        self._remember(key, decoded.nbytes)
        self._memory.abandon(key)
        self._in_flight -= 1

    def _fail(self, entry: Entry[Resident], error: EngineError) -> None:
        self._memory.fail(entry, error)
        self._failed.append(entry.key)

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
        except BaseException as cause:  # noqa: BLE001 - a panic in a native library is its own too
            result = AdapterUnavailable(entry.key, cause)
        self._post(entry, result)

    def _make_resident(self, entry: Entry[Resident], decoded: _Decoded) -> None:
        """In a loader thread: pack what was decoded."""
        result: Resident | EngineError
        try:
            packed = self._pack(decoded.deltas) if decoded.deltas is not None else {}
            result = Resident(packed, decoded.applied)
        except BaseException as cause:  # noqa: BLE001 - a packing error is this adapter's own
            result = AdapterUnavailable(entry.key, cause)
        self._post(entry, result)

    def _post(self, entry: Entry[Resident], result: object) -> None:
        self._arrived.append((entry, result))
        self._wake()
