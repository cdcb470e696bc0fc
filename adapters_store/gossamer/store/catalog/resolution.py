"""What a caller gets while it uses versions: the hold on them, or a file."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from gossamer.store.catalog.holds import Held
from gossamer.store.catalog.views import Resolved


class Resolution:
    """What a request's references meant when it came in, and the hold on those versions.

    Until `release` their blobs are kept, whatever is uploaded, rolled back or deleted. Release once
    the request has had its final message; a second release does nothing.

    Attributes:
        versions: in the order of the references.
    """

    def __init__(
        self, versions: tuple[Resolved, ...], give_back: Callable[[Sequence[Held]], None]
    ) -> None:
        self.versions = versions
        self._give_back = give_back
        self._released = False
        self._lock = threading.Lock()

    def release(self) -> None:
        """End the hold. Does no I/O, so an event loop may call it; from any thread."""
        with self._lock:
            if self._released:
                return
            self._released = True
        self._give_back([Held(v.digest, v.blob_id) for v in self.versions])

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()


@dataclass(frozen=True)
class Download:
    """A version's stored file; the path is good until the context it came from ends."""

    version: Resolved
    path: Path


@dataclass(frozen=True)
class Increment:
    """What a version adds to its parents, as a file of its own.

    Attributes:
        version: whose increment it is.
        digest: of the increment.
        blob_id: sha256 of the file's bytes, 64 hex digits.
        nbytes: its size.
        path: good until the context it came from ends.
    """

    version: Resolved
    digest: str
    blob_id: str
    nbytes: int
    path: Path
