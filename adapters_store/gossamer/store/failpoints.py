"""Places on the upload and delete paths of adapters and files where a test may stop the process.

The blobs and the catalog take a `Hook` in their constructor and call it at each point; `ignore`,
the default, costs one function call beside several fsyncs. Nothing is read from the environment: a
test starts a process of its own and passes `KillAt` in.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable
from enum import StrEnum


class Failpoint(StrEnum):
    """Every point, in the order in which an upload, then a delete, passes it.

    A training file is spooled and put like an adapter, so it passes those `UPLOAD_` points as well;
    its own are `FILE_`. Either one's delete goes on to the collection of its blob.
    """

    UPLOAD_SPOOLING = "upload.spooling"  # the first chunk is in the temp file
    UPLOAD_SPOOLED = "upload.spooled"  # all bytes written, not yet synced
    UPLOAD_SYNCED = "upload.synced"  # temp file durable
    UPLOAD_VALIDATED = "upload.validated"
    UPLOAD_STAGING = "upload.staging"  # inside the first transaction, before its commit
    UPLOAD_STAGED = "upload.staged"
    UPLOAD_RENAMED = "upload.renamed"  # blob in place, its folder not yet synced
    UPLOAD_STORED = "upload.stored"  # blob durable
    UPLOAD_REGISTERING = "upload.registering"  # inside the second transaction
    UPLOAD_REGISTERED = "upload.registered"  # committed, not yet acknowledged
    DELETE_TOMBSTONING = "delete.tombstoning"  # inside the transaction
    DELETE_TOMBSTONED = "delete.tombstoned"
    DELETE_CLAIMED = "delete.claimed"  # no hold, no version; blob still there
    DELETE_UNLINKED = "delete.unlinked"  # blob gone, its row not yet
    DELETE_COLLECTED = "delete.collected"
    FILE_STAGING = "file.staging"  # inside the first transaction, before its commit
    FILE_STAGED = "file.staged"
    FILE_REGISTERING = "file.registering"  # inside the second transaction
    FILE_REGISTERED = "file.registered"  # committed, not yet acknowledged
    FILE_TOMBSTONING = "file.tombstoning"  # inside the transaction of a delete
    FILE_TOMBSTONED = "file.tombstoned"


Hook = Callable[[Failpoint], None]


def ignore(point: Failpoint) -> None:
    """The hook of every process that is not a test."""


class KillAt:
    """A hook that kills its own process with SIGKILL when `point` is passed for the `nth` time.

    No handler, no flush, no `finally` runs: what is left is what a power cut would leave, but for
    the page cache.
    """

    def __init__(self, point: Failpoint, nth: int = 1) -> None:
        self._point, self._left = point, nth
        self._lock = threading.Lock()

    def __call__(self, point: Failpoint) -> None:
        if point is not self._point:
            return
        with self._lock:
            self._left -= 1
            if self._left == 0:
                os.kill(os.getpid(), signal.SIGKILL)
