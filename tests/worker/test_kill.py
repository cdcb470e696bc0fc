"""Workers that are killed, and workers that sleep past their lease and wake up."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from gossamer.jobs.views import Job
from gossamer.store.catalog.errors import RegistryBusy
from tests.worker.support import TENANT, Plant, end, planted

# So many steps that none has ended when a worker is killed: it is heard of every third of a second.
SETTINGS = {"max_steps": 160, "learning_rate": 1e-3}

pytestmark = pytest.mark.gate  # every worker is a process that imports torch


@pytest.fixture
def plant(tmp_path: Path, tiny_dir: Callable[..., Path]) -> Iterator[Plant]:
    with planted(tmp_path / "data", tiny_dir("llama")) as made:
        yield made


def undisturbed(plant: Plant, method: str) -> str | None:
    """The digest that the job would have."""
    job = plant.submit(method, settings=SETTINGS, suffix="undisturbed")
    plant.work()
    return plant.get(job).digest


def stop(worker: subprocess.Popen[bytes], plant: Plant, job: Job) -> int:
    """Where it holds no lock of SQLite: then nobody could write, whoever has the job.

    Returns the attempt that it was at: to find the lock held takes longer than its lease, after
    which it may have begun another one.
    """
    for _ in range(10):
        worker.send_signal(signal.SIGSTOP)
        os.waitid(os.P_PID, worker.pid, os.WSTOPPED)  # its threads go on for a moment
        try:
            with plant.store.registry.write():
                pass
            return plant.get(job).attempt
        except RegistryBusy:
            worker.send_signal(signal.SIGCONT)
            time.sleep(0.05)
    raise TimeoutError("it holds the registry's lock whenever it is looked at")


@pytest.mark.parametrize("method", ["sparta", "lota"])
def test_a_killed_worker_is_replaced_and_the_result_is_the_same(method: str, plant: Plant) -> None:
    right = undisturbed(plant, method)
    job = plant.submit(method, settings=SETTINGS)
    for step in (3, 20):
        worker = plant.process(lease_s=1.0)
        plant.wait(job, lambda now, step=step: (now.step or 0) >= step)  # type: ignore[misc]
        assert end(worker, signal.SIGKILL) == -signal.SIGKILL
    worker = plant.process(lease_s=1.0)
    done = plant.wait(job, lambda now: now.status in {"succeeded", "failed"})
    assert end(worker) == 0
    assert done.status == "succeeded"
    assert done.attempt == 3
    assert done.digest == right
    steps = [e.step for e in plant.backlog.events(TENANT, job.id, limit=1000).items if e.step]
    assert len(steps) == len(set(steps)), "no step is told twice"


def test_a_zombie_changes_nothing(plant: Plant) -> None:
    """Stopped past its lease, and woken when another has the job, and when the job has ended."""
    right = undisturbed(plant, "sparta")
    job = plant.submit(settings=SETTINGS)
    zombie = plant.process(lease_s=1.0)
    try:
        plant.wait(job, lambda now: (now.step or 0) >= 3)
        attempt = stop(zombie, plant, job)
        other = plant.process(lease_s=1.0)
        plant.wait(job, lambda now: now.attempt > attempt and (now.step or 0) >= 5)
        zombie.send_signal(signal.SIGCONT)
        done = plant.wait(job, lambda now: now.status == "succeeded")
        time.sleep(1.0)
    finally:
        zombie.send_signal(signal.SIGCONT)
        assert end(zombie) == 0
    assert end(other) == 0
    assert plant.get(job) == done, "nothing came after"
    assert done.digest == right
    (adapter,) = [a for a in plant.store.catalog.list(TENANT) if a.name == "made"]
    assert [version.number for version in adapter.versions if version.tag is None] == [1]
