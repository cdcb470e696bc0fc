"""One byte budget for KV pages and resident adapters. Plain Python, no tensors.

An adapter (or what a mix was compiled to) is an *entry*. It is loading, resident or failed; it is
pinned while a running row uses it. When memory is wanted, whatever was not used for longest goes,
be it a cached KV page or an unpinned entry; and nothing goes unless that will be enough.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Collection
from dataclasses import dataclass
from enum import Enum
from typing import Generic, TypeVar

from gossamer.engine.errors import EngineError
from gossamer.engine.pages import PagePool

Payload = TypeVar("Payload")


class State(Enum):
    """Where an entry is on its way into memory."""

    LOADING = "loading"
    RESIDENT = "resident"
    FAILED = "failed"


@dataclass
class Entry(Generic[Payload]):
    """An adapter in memory, or on its way there. `nbytes` is reserved as soon as it is known."""

    key: str
    state: State = State.LOADING
    nbytes: int = 0
    pins: int = 0
    stamp: int = 0
    payload: Payload | None = None
    error: EngineError | None = None


@dataclass
class MemoryCounts:
    """What happened so far."""

    loads: int = 0
    load_failures: int = 0
    evictions: int = 0


class Memory(Generic[Payload]):
    """The budget, the page pool and the entries under it."""

    def __init__(self, total_bytes: int, page_bytes: int, page_size: int) -> None:
        self.total_bytes = total_bytes
        self.page_bytes = page_bytes
        self.pages = PagePool(total_bytes // page_bytes, page_size)
        self.counts = MemoryCounts()
        self._entries: OrderedDict[str, Entry[Payload]] = OrderedDict()  # least recently used first
        self._entry_bytes = 0
        self._clock = 0

    # -- the ledger

    @property
    def adapter_bytes(self) -> int:
        """Bytes reserved by entries."""
        return self._entry_bytes

    @property
    def kv_bytes(self) -> int:
        """Bytes of KV pages that are held or cached."""
        return self.pages.used * self.page_bytes

    @property
    def free_bytes(self) -> int:
        """Bytes that nothing uses."""
        return self.total_bytes - self._entry_bytes - self.kv_bytes

    def available_bytes(self, keep: Collection[str] = ()) -> int:
        """Bytes that are free or could be made free at once without evicting `keep`."""
        idle = sum(e.nbytes for e in self._entries.values() if self._idle(e) and e.key not in keep)
        return self.free_bytes + idle + self.pages.cached * self.page_bytes

    def tick(self) -> int:
        """Advance the clock that orders uses, once a step; returns the new stamp."""
        self._clock += 1
        return self._clock

    def make_room(self, nbytes: int, keep: Collection[str] = ()) -> bool:
        """Evict until `nbytes` are free, but none of `keep`.

        False, with nothing evicted, if that cannot be reached.
        """
        if self.free_bytes >= nbytes:
            return True
        if self.available_bytes(keep) < nbytes:
            return False
        while self.free_bytes < nbytes:
            page_stamp = self.pages.oldest_cached()
            entry = next(
                (e for e in self._entries.values() if self._idle(e) and e.key not in keep), None
            )
            if entry is not None and (page_stamp is None or entry.stamp <= page_stamp):
                self._drop(entry)
                self.counts.evictions += 1
            else:
                self.pages.evict()
        return True

    # -- KV pages

    def can_allocate(self, pages: int) -> bool:
        """Whether `pages` more pages could be held now."""
        return pages * self.page_bytes <= self.available_bytes()

    def allocate(self) -> int | None:
        """Hold one page, evicting if need be; None when there is no room."""
        if not self.make_room(self.page_bytes):
            return None
        return self.pages.allocate()

    # -- adapters

    def get(self, key: str) -> Entry[Payload] | None:
        """The entry of that key, whatever its state."""
        return self._entries.get(key)

    def begin(self, key: str) -> Entry[Payload]:
        """A new entry in state LOADING."""
        entry: Entry[Payload] = Entry(key, stamp=self._clock)
        self._entries[key] = entry
        return entry

    def reserve(self, entry: Entry[Payload], nbytes: int, keep: Collection[str] = ()) -> bool:
        """Set room for an entry aside. False while what it would need is pinned or to be kept."""
        if not self.make_room(nbytes, keep):
            return False
        entry.nbytes = nbytes
        self._entry_bytes += nbytes
        return True

    def finish(self, entry: Entry[Payload], payload: Payload, nbytes: int) -> None:
        """The entry is in memory; `nbytes` is its true size (at most what was reserved)."""
        self._entry_bytes += nbytes - entry.nbytes
        entry.nbytes, entry.payload, entry.state = nbytes, payload, State.RESIDENT
        self.counts.loads += 1
        self.touch(entry)

    def fail(self, entry: Entry[Payload], error: EngineError) -> None:
        """The entry cannot be had. It stays, without bytes, until `clear_failed`."""
        self._entry_bytes -= entry.nbytes
        entry.nbytes, entry.payload = 0, None
        entry.state, entry.error = State.FAILED, error
        self.counts.load_failures += 1

    def abandon(self, key: str) -> None:
        """Forget an entry that is still loading and has no bytes."""
        if self._entries[key].state is State.LOADING:
            del self._entries[key]

    def clear_failed(self, key: str) -> None:
        """Forget a failure, so that the next request tries again."""
        entry = self._entries.get(key)
        if entry is not None and entry.state is State.FAILED:
            del self._entries[key]

    def touch(self, entry: Entry[Payload]) -> None:
        """Note a use."""
        entry.stamp = self._clock
        self._entries.move_to_end(entry.key)

    def pin(self, key: str) -> None:
        """A running row uses a resident entry: it cannot be evicted."""
        entry = self._entries[key]
        entry.pins += 1
        self.touch(entry)

    def unpin(self, key: str) -> None:
        """A running row no longer uses the entry."""
        entry = self._entries[key]
        entry.pins -= 1
        self.touch(entry)

    def resident(self) -> dict[str, int]:
        """Key → bytes of everything resident. May be called from any thread."""
        return {e.key: e.nbytes for e in list(self._entries.values()) if e.state is State.RESIDENT}

    def check_integrity(self) -> None:
        """Raise `RuntimeError` unless the ledger adds up."""
        self.pages.check_integrity()
        if self._entry_bytes != sum(e.nbytes for e in self._entries.values()):
            raise RuntimeError("the adapters' bytes do not add up")
        if self.free_bytes < 0:
            raise RuntimeError("more memory is in use than there is")
        if any(
            e.pins < 0 or (e.pins and e.state is not State.RESIDENT) for e in self._entries.values()
        ):
            raise RuntimeError("an entry is pinned that is not resident")

    def _idle(self, entry: Entry[Payload]) -> bool:
        return entry.state is State.RESIDENT and not entry.pins

    def _drop(self, entry: Entry[Payload]) -> None:
        del self._entries[entry.key]
        self._entry_bytes -= entry.nbytes
