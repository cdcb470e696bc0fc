"""Holds: what this process's requests still need, so that its blobs are not unlinked.

A hold is taken after the registry was read, and a blob may be unlinked between the two. Instead of
one lock around both, readers compare a generation number: whoever is about to unlink raises it, and
a reader that finds it changed reads again (then the registry shows the tombstone).
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Hashable, Iterable
from typing import NamedTuple, TypeVar

Key = TypeVar("Key", bound=Hashable)


class Held(NamedTuple):
    """What one hold keeps: a digest, and the blob that encodes it. For a file its id stands in the
    digest's place."""

    digest: str
    blob_id: str


class Holds:
    """Counts of holds, in this process only. Thread-safe; no call waits for anything but the lock.

    The contract of whoever unlinks a blob: its tombstones are committed, then `claim` says yes,
    then it unlinks.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._generation = 0
        self._held: Counter[Held] = Counter()
        self._blobs: Counter[str] = Counter()
        self._doomed: set[str] = set()

    def generation(self) -> int:
        """Read this before the registry."""
        with self._lock:
            return self._generation

    def take(self, wanted: Iterable[Held], generation: int) -> bool:
        """Hold all of `wanted`, unless something was unlinked since `generation` was read."""
        with self._lock:
            if generation != self._generation:
                return False
            for item in wanted:
                self._held[item] += 1
                self._blobs[item.blob_id] += 1
            return True

    def give_back(self, items: Iterable[Held]) -> list[str]:
        """End one hold of each; returns the blobs that only these holds kept from collection."""
        free = []
        with self._lock:
            for item in items:
                _lower(self._held, item)
                _lower(self._blobs, item.blob_id)
                if item.blob_id not in self._blobs and item.blob_id in self._doomed:
                    self._doomed.remove(item.blob_id)
                    free.append(item.blob_id)
        return free

    def claim(self, blob_id: str) -> bool:
        """Whether the blob may be unlinked now. If it is held, `give_back` names it in time."""
        with self._lock:
            if blob_id in self._blobs:
                self._doomed.add(blob_id)
                return False
            self._generation += 1
            return True

    def blob_of(self, digest: str) -> str | None:
        """A held blob that encodes `digest`, if there is one."""
        with self._lock:
            return next((item.blob_id for item in self._held if item.digest == digest), None)

    def check_integrity(self) -> None:
        """Raise RuntimeError if the two counts disagree (for tests and for idle moments)."""
        with self._lock:
            blobs: Counter[str] = Counter()
            for item, count in self._held.items():
                blobs[item.blob_id] += count
            if blobs != self._blobs or not self._doomed <= set(self._blobs):
                raise RuntimeError("the counts of holds disagree")

    def __len__(self) -> int:
        with self._lock:
            return self._held.total()


def _lower(counts: Counter[Key], key: Key) -> None:
    counts[key] -= 1
    if counts[key] == 0:
        del counts[key]
