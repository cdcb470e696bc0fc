"""What jobs have left in the work folder goes, and nothing that somebody goes on from."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest

from gossamer.jobs.backlog import Backlog
from gossamer.jobs.requests import JobRequest
from gossamer.jobs.views import JobLimits
from gossamer.store.catalog.errors import RegistryBusy
from gossamer.store.catalog.opening import Store
from gossamer.store.clock import utc_now
from gossamer.training import worker as workers
from gossamer.training.worker import Worker
from tests.worker.support import TENANT, Plant, planted


@pytest.fixture
def plant(tmp_path: Path, tiny_dir: Callable[..., Path]) -> Iterator[Plant]:
    with planted(tmp_path / "data", tiny_dir("llama")) as made:
        yield made


def left(plant: Plant, *names: str) -> None:
    """Folders as attempts leave them."""
    for name in names:
        folder = plant.data / "work" / name / "attempt-1" / "train" / "checkpoint-3"
        folder.mkdir(parents=True)
        (folder / "values.safetensors").write_bytes(b"x")


def there(plant: Plant) -> set[str]:
    return {path.name for path in (plant.data / "work").iterdir()}


def test_a_job_that_was_cancelled_while_it_was_paused_leaves_nothing(plant: Plant) -> None:
    job = plant.submit()
    stop = threading.Event()

    def pausing(message: str) -> None:
        plant.backlog.pause(TENANT, job.id)
        stop.set()

    with Store(plant.data, plant.info) as store:
        backlog = Listening(store, "Step 1/", pausing)
        Worker(store, plant.base, backlog, plant.data / "work", name="a").run(stop)
    assert plant.get(job).status == "paused"
    assert there(plant) == {job.id}
    plant.work()
    assert there(plant) == {job.id}, "it may be resumed"
    plant.backlog.cancel(TENANT, job.id)
    plant.work()
    assert there(plant) == set()


class Listening(Backlog):
    """A backlog that does something when a worker says something."""

    def __init__(self, store: Store, said: str, do: Callable[[str], None]) -> None:
        super().__init__(store.registry)
        self._said, self._do = said, do

    def event(self, claim: Any, level: Any, message: str, *given: Any, **named: Any) -> bool:
        if message.startswith(self._said):
            self._do(message)
        return super().event(claim, level, message, *given, **named)


def test_a_job_that_was_given_up_leaves_nothing(plant: Plant) -> None:
    job = plant.submit()
    later = Backlog(
        plant.store.registry,
        clock=lambda: utc_now() + timedelta(hours=1),
        limits=JobLimits(max_attempts=1),
    )
    assert plant.backlog.claim("dead", 30.0) is not None
    left(plant, job.id)
    assert later.claim("other", 30.0) is None
    assert plant.get(job).status == "failed"
    plant.work()
    assert there(plant) == set()


def test_only_what_no_job_needs_goes(plant: Plant) -> None:
    ended, running, paused = (plant.submit(suffix=name) for name in ("e", "r", "p"))
    plant.backlog.cancel(TENANT, ended.id)
    plant.backlog.pause(TENANT, paused.id)
    claim = plant.backlog.claim("other", 30.0)
    assert claim is not None
    assert claim.job.id == running.id
    request = JobRequest.of(
        method="sparta", training_file=plant.file(b"{}\n"), base_fingerprint="sha256:" + "0" * 64
    )
    elsewhere = plant.backlog.submit(TENANT, request)  # queued, for a worker with another base
    unknown = "ftjob-" + "0" * 24
    left(plant, ended.id, running.id, paused.id, elsewhere.id, unknown, "mine")
    (plant.data / "work" / ("ftjob-" + "1" * 24)).write_text("no folder")
    plant.work()
    kept = {running.id, paused.id, elsewhere.id, "mine", "ftjob-" + "1" * 24}
    assert there(plant) == kept
    assert list((plant.data / "work" / running.id).rglob("values.safetensors"))


def test_what_is_taken_between_the_two_looks_stays(plant: Plant) -> None:
    """A folder that was there when they were listed, of a job that another worker takes before the
    registry is asked, and one that is made in between."""
    job, other = plant.submit(suffix="a"), plant.submit(suffix="b")
    left(plant, job.id)
    asked: list[set[str]] = []

    class Between(Backlog):
        def ended(self, job_ids: Any) -> frozenset[str]:
            plant.backlog.claim("other", 30.0)
            plant.backlog.claim("third", 30.0)
            left(plant, other.id)
            asked.append(set(job_ids))
            return super().ended(job_ids)

    with Store(plant.data, plant.info) as store:
        made = Worker(store, plant.base, Between(store.registry), plant.data / "work", name="a")
        assert made.run(threading.Event(), once=True) == 0
    assert asked == [{job.id}]
    assert there(plant) == {job.id, other.id}


def test_a_registry_that_does_not_answer_removes_nothing(plant: Plant) -> None:
    unknown = "ftjob-" + "0" * 24
    left(plant, unknown)

    class Away(Backlog):
        def ended(self, job_ids: Any) -> frozenset[str]:
            raise RegistryBusy(5.0)

    with Store(plant.data, plant.info) as store:
        made = Worker(store, plant.base, Away(store.registry), plant.data / "work", name="a")
        assert made.run(threading.Event(), once=True) == 0
    assert there(plant) == {unknown}


def test_it_looks_at_its_start_and_then_now_and_then(
    plant: Plant, monkeypatch: pytest.MonkeyPatch
) -> None:
    unknown = ["ftjob-" + f"{i}" * 24 for i in range(4)]
    left(plant, unknown[0])
    monkeypatch.setattr(workers, "POLL_S", 0.02)
    stop, asked = threading.Event(), threading.Semaphore(0)

    class Counting(Backlog):
        def claim(self, *given: Any, **named: Any) -> Any:
            asked.release()
            return super().claim(*given, **named)

    def polled(times: int) -> None:
        for _ in range(times):
            assert asked.acquire(timeout=30)

    with Store(plant.data, plant.info) as store:
        made = Worker(store, plant.base, Counting(store.registry), plant.data / "work", name="a")
        thread = threading.Thread(target=made.run, args=(stop,))
        thread.start()
        try:
            polled(1)
            assert there(plant) == set()
            left(plant, unknown[1])
            polled(5)
            assert there(plant) == {unknown[1]}, "not at every look into the queue"
            monkeypatch.setattr(workers, "SWEEP_S", 0.0)
            polled(5)
            assert there(plant) == set()
        finally:
            stop.set()
            thread.join()
