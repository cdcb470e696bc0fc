"""One byte budget for KV pages and resident adapters. Plain Python, no tensors.

An adapter in memory (or what a mix was compiled to) is an *entry*; it is pinned while a running row
uses it. When memory is wanted, whatever was not used for longest goes, be it a cached KV page or an
unpinned entry; and nothing goes unless that will be enough.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Collection
from dataclasses import dataclass
from typing import Generic, TypeVar

from gossamer.engine.frames import Frames, Move, Run
from gossamer.engine.pages import PagePool

Payload = TypeVar("Payload")


@dataclass
class Entry(Generic[Payload]):
    """An adapter in memory."""

    key: str
    payload: Payload
    nbytes: int
    stamp: int
    pins: int = 0
    run: Run | None = None


@dataclass
class MemoryCounts:
    """What happened so far."""

    loads: int = 0
    load_failures: int = 0
    evictions: int = 0


class Memory(Generic[Payload]):
    """The budget, the page pool and the entries under it.

    Args:
        total_bytes: of all of it.
        page_bytes: of a KV page, keys and values of all layers.
        page_size: tokens of a page.
        framed: whether all of it is one block of memory, in which entries take whole frames beside
            each other (`frames`); else memory is anywhere, and only its bytes count.
    """

    def __init__(
        self, total_bytes: int, page_bytes: int, page_size: int, *, framed: bool = False
    ) -> None:
        self.total_bytes = total_bytes
        self.page_bytes = page_bytes
        self.frames = Frames(total_bytes // page_bytes) if framed else None
        self.pages = PagePool(total_bytes // page_bytes, page_size, self.frames)
        self._moves: list[Move] = []
        self.counts = MemoryCounts()
        self._entries: OrderedDict[str, Entry[Payload]] = OrderedDict()  # least recently used first
        self._entry_bytes = 0
        self._clock = 0

    # -- the ledger

    @property
    def adapter_bytes(self) -> int:
        """Bytes of the entries."""
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
        """The entry of that key, if it is in memory."""
        return self._entries.get(key)

    def add(self, key: str, payload: Payload, nbytes: int, keep: Collection[str] = ()) -> bool:
        """Take an adapter in. False while what it would need is pinned or to be kept.

        In one block of memory, other entries may have been evicted in vain, when what is pinned
        lies between what is free; and `take_moves` says what must be copied aside first.
        """
        run = None
        if self.frames is not None:
            count = -(-nbytes // self.page_bytes)
            nbytes = count * self.page_bytes
            if not self.make_room(nbytes, keep):
                return False
            if count and (run := self._run(count, keep)) is None:
                return False
        elif not self.make_room(nbytes, keep):
            return False
        self._entries[key] = Entry(key, payload, nbytes, self._clock, run=run)
        self._entry_bytes += nbytes
        self.counts.loads += 1
        return True

    def take_moves(self) -> list[Move]:
        """What `add` moved aside since this was last asked: to be copied before anything else."""
        moves, self._moves = self._moves, []
        return moves

    def remove(self, key: str) -> None:
        """Take out an entry that nobody uses any more."""
        self._drop(self._entries[key])

    def _run(self, count: int, keep: Collection[str]) -> Run | None:
        """Neighbouring frames for an entry, where room has been made; more is evicted if need be,
        least recently used first."""
        if self.frames is None:
            return None
        while True:
            found = self.frames.take_run(count)
            if found is not None:
                run, moves = found
                self._moves += moves
                return run
            idle = next(
                (e for e in self._entries.values() if self._idle(e) and e.key not in keep), None
            )
            if idle is None:
                return None
            self._drop(idle)
            self.counts.evictions += 1

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
        return {e.key: e.nbytes for e in list(self._entries.values())}

    def check_integrity(self) -> None:
        """Raise `RuntimeError` unless the ledger adds up."""
        self.pages.check_integrity()
        if self.frames is not None:
            self.frames.check_integrity()
            runs = sum(e.run.count for e in self._entries.values() if e.run is not None)
            if self.frames.pages != self.pages.used or self.frames.free != (
                self.pages.num_pages - self.pages.used - runs
            ):
                raise RuntimeError("frames are taken that nothing has")
        if self._entry_bytes != sum(e.nbytes for e in self._entries.values()):
            raise RuntimeError("the adapters' bytes do not add up")
        if self.free_bytes < 0:
            raise RuntimeError("more memory is in use than there is")
        if any(e.pins < 0 for e in self._entries.values()):
            raise RuntimeError("an entry was unpinned more often than pinned")

    def _idle(self, entry: Entry[Payload]) -> bool:
        return not entry.pins

    def _drop(self, entry: Entry[Payload]) -> None:
        del self._entries[entry.key]
        self._entry_bytes -= entry.nbytes
        if entry.run is not None and self.frames is not None:
            self.frames.drop_run(entry.run)
