"""A worker in a process of its own: `python -m tests.worker.child DATA BASE LEASE`."""

from __future__ import annotations

import signal
import sys
import threading
from pathlib import Path

import torch

from gossamer.jobs.backlog import Backlog
from gossamer.store.catalog.opening import Store
from gossamer.training import loop
from gossamer.training.worker import Worker
from tests.worker.support import base_in


def main() -> None:
    """Serve until SIGTERM."""
    data, folder, lease_s = Path(sys.argv[1]), Path(sys.argv[2]), float(sys.argv[3])
    loop.CHECKPOINT_SECONDS = 0.0  # after every step, for what is killed to be gone on with
    loop.CHECKPOINT_SHARE = 1.0
    torch.set_num_threads(1)
    stop = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: stop.set())
    base, info = base_in(folder)
    with Store(data, info) as store:
        backlog = Backlog(store.registry)
        worker = Worker(store, base, backlog, data / "work", name="child", lease_s=lease_s)
        worker.run(stop)


if __name__ == "__main__":
    main()
