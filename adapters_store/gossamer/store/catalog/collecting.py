"""Collection when holds end: in a thread of its own, for it writes to the registry and waits for
the disk, and whoever ends a hold must do neither."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

from gossamer.store.catalog.holds import Held
from gossamer.store.catalog.parts import Parts
from gossamer.store.catalog.removing import collect_quietly


class Collector:
    """Ends holds, and collects what they alone had kept. Thread-safe."""

    def __init__(self, parts: Parts) -> None:
        self._parts = parts
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="catalog-collector")
        self._closing = threading.Lock()
        self._closed = False

    def give_back(self, items: Sequence[Held]) -> None:
        """End one hold of each; does no I/O."""
        for blob_id in self._parts.holds.give_back(items):
            with self._closing:
                if not self._closed:
                    self._thread.submit(collect_quietly, self._parts, blob_id)

    def close(self) -> None:
        """Finish collecting. What later ends of holds set free is for the next `recover`."""
        with self._closing:
            self._closed = True
        self._thread.shutdown(wait=True)
