"""A worker on a small disk that is filled: `python -m tests.worker.full_disk DISK BASE`.

The data folder lies on DISK, a file system of its own of a few MiB. For one amount of room after
the other, down to none, a worker is given a job, as little room as that, and later all of it. One
JSON object a line tells how each job went.
"""

from __future__ import annotations

import json
import logging
import shutil
import sys
import threading
import time
from pathlib import Path
from typing import Any

from gossamer.jobs.backlog import Backlog
from gossamer.jobs.views import Job
from gossamer.store.catalog.errors import StoreFull
from gossamer.store.catalog.opening import Store
from gossamer.store.format import digest
from gossamer.training import loop
from gossamer.training.worker import Worker
from tests.training.support import counting_examples
from tests.worker.support import TENANT, Plant, base_in

#: Bytes that the worker has, besides what it takes itself.
ROOMS = (0, 4_096, 60_000, 200_000, 400_000, 1_000_000, 1_600_000, 1_800_000, 4_000_000)
RESERVE = 300_000
LEASE_S = 1.5
#: A dense phase and a sparse one, each with checkpoints, and versions to try on the way.
SETTINGS: dict[str, Any] = {"max_steps": 6, "checkpoint_steps": 2, "batch_size": 8}
PARAMETERS: dict[str, Any] = {"sparsity": 0.5, "calibration_steps": 3}


def fill(disk: Path, room: int) -> Path:
    """Leave so much room on the disk."""
    filler = disk / "filler"
    with filler.open("wb") as file:
        file.write(bytes(max(0, shutil.disk_usage(disk).free - room)))
    return filler


def serve(plant: Plant, store: Store, job: Job, seconds: float) -> Job:
    """Workers of the queue, one after the other, until the job has ended or time is up."""
    worker = Worker(
        store, plant.base, Backlog(store.registry), plant.data / "work", name="here",
        lease_s=LEASE_S,
    )  # fmt: skip
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        worker.run(threading.Event(), once=True)
        if plant.get(job).finished_at is not None:
            break
        time.sleep(0.1)
    return plant.get(job)


def check(plant: Plant) -> None:
    """Whatever can be seen is whole, and there is nothing else."""
    for adapter in plant.store.catalog.list(TENANT):
        for version in adapter.versions:
            assert version.status == "active"
            assert digest(plant.store.catalog.open(version.digest)) == version.digest
    for file in plant.store.files.list(TENANT, limit=1000).items:
        with plant.store.files.content(TENANT, file.id) as path:
            assert path.stat().st_size == file.nbytes
    left = list((plant.data / "store" / "spool").iterdir())
    assert not left, left


def try_room(plant: Plant, disk: Path, room: int, data: str) -> dict[str, Any]:
    """A job with so much room, and what has become of it once there was more."""
    name = f"with-{room}"
    job = plant.submit("lota", PARAMETERS, file=data, settings=SETTINGS, suffix=name)
    filler = fill(disk, room)
    try:
        with Store(plant.data, plant.info, reserve_bytes=RESERVE) as store:
            first = serve(plant, store, job, 2 * LEASE_S)
    except StoreFull:  # there was not even room for the registry's own files
        first = plant.get(job)
    check(plant)
    current = plant.store.catalog.show(TENANT, name).current if has(plant, name) else None
    assert (current is not None) == (first.status == "succeeded")
    filler.unlink()
    with Store(plant.data, plant.info, reserve_bytes=RESERVE) as store:
        last = serve(plant, store, job, 20 * LEASE_S)
    check(plant)
    for checkpoint in plant.backlog.checkpoints(TENANT, job.id, limit=100).items:
        plant.store.catalog.open(checkpoint.digest)
    if has(plant, name):
        plant.store.catalog.delete(TENANT, name)
    return {
        "room": room, "first": first.status, "last": last.status, "attempt": last.attempt,
        "error": None if last.error is None else last.error.code,
        "message": None if last.error is None else last.error.message,
        "work": [path.name for path in (plant.data / "work").glob("*")],
    }  # fmt: skip


def has(plant: Plant, name: str) -> bool:
    return any(adapter.name == name for adapter in plant.store.catalog.list(TENANT))


def main() -> None:
    """Try all of them."""
    logging.basicConfig(level=logging.WARNING)
    disk, folder = Path(sys.argv[1]), Path(sys.argv[2])
    loop.CHECKPOINT_SECONDS, loop.CHECKPOINT_SHARE = 0.0, 1.0  # after every step
    base, info = base_in(folder)
    data = disk / "data"
    with Store(data, info, owner=True, reserve_bytes=RESERVE) as store:
        store.catalog.create_tenant(TENANT)
        plant = Plant(data, base, info, store, Backlog(store.registry))
        examples = plant.file(counting_examples())
        for room in ROOMS:
            print(json.dumps(try_room(plant, disk, room, examples)), flush=True)  # noqa: T201


if __name__ == "__main__":
    main()
