"""What a worker hears while it works, and how soon: a pause, a cancel, its own end."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from gossamer.store.catalog.opening import Store
from gossamer.training import attempt
from gossamer.training.batches import collate
from gossamer.training.encode import Encoded
from gossamer.training.run import TrainResult
from gossamer.training.worker import Worker
from tests.training.support import counting_examples
from tests.worker.support import TENANT, Plant, planted
from tests.worker.test_sweeping import Listening


@pytest.fixture
def plant(tmp_path: Path, tiny_dir: Callable[..., Path]) -> Iterator[Plant]:
    with planted(tmp_path / "data", tiny_dir("llama")) as made:
        yield made


def worker_on(plant: Plant, store: Store, said: str, do: Callable[[str], Any]) -> Worker:
    """A worker in this process, and something that happens when it says something; its lease is so
    long that it sends no heartbeat."""
    backlog = Listening(store, said, do)
    return Worker(store, plant.base, backlog, plant.data / "work", name="here", lease_s=3600.0)


ENDLESS = {"max_steps": 100_000, "learning_rate": 1e-4, "checkpoint_steps": 100_000}


@pytest.mark.parametrize(("action", "status"), [("pause", "paused"), ("cancel", "cancelled")])
def test_it_is_heard_between_two_heartbeats(action: str, status: str, plant: Plant) -> None:
    job = plant.submit(settings=ENDLESS)
    asked: list[float] = []

    def ask(message: str) -> None:
        if not asked:
            asked.append(time.monotonic())
            getattr(plant.backlog, action)(TENANT, job.id)

    with Store(plant.data, plant.info) as store:
        worker_on(plant, store, "Step 1/", ask).run(threading.Event(), once=True)
    assert time.monotonic() - asked[0] < 20, "the heartbeat is due after 20 minutes"
    assert plant.get(job).status == status
    kept = {path.name for path in (plant.data / "work").iterdir()}
    assert kept == ({job.id} if action == "pause" else set())


def test_a_second_interrupt_is_not_the_jobs_failure(
    plant: Plant, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It ends the worker; the job is taken again, from what was kept, when the lease is over."""
    job = plant.submit()
    whole = plant.submit(suffix="whole")
    saving = TrainResult.save

    def interrupted(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(TrainResult, "save", interrupted)
    with pytest.raises(KeyboardInterrupt):
        plant.work(lease_s=1.0)
    now = plant.get(job)
    assert (now.status, now.error, now.attempt) == ("running", None, 1)
    assert not any("failed" in message for message in plant.messages(job))
    assert list((plant.data / "work" / job.id).rglob("result.safetensors")), "it goes on from here"
    monkeypatch.setattr(TrainResult, "save", saving)
    time.sleep(1.1)
    plant.work()
    one, other = plant.get(job), plant.get(whole)
    assert (one.status, one.attempt, other.status) == ("succeeded", 2, "succeeded")
    assert one.digest == other.digest


def test_the_end_of_a_worker_is_not_the_jobs_failure_while_it_reads_either(
    plant: Plant, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = plant.submit()

    def interrupted(*_: Any, **__: Any) -> None:
        raise SystemExit(3)

    monkeypatch.setattr("gossamer.training.run.read_examples", interrupted)
    with pytest.raises(SystemExit):
        plant.work()
    assert (plant.get(job).status, plant.get(job).error) == ("running", None)


def slowly(monkeypatch: pytest.MonkeyPatch, do: Callable[[], Any]) -> list[int]:
    """Make each batch of an evaluation take a while, and do something with the first one; returns
    how many there were."""
    batches: list[int] = []

    def collating(rows: list[Encoded], pad_id: int) -> Any:
        batches.append(len(rows))
        if len(batches) == 1:
            do()
        time.sleep(0.05)
        return collate(rows, pad_id)

    monkeypatch.setattr("gossamer.training.trainee.collate", collating)
    return batches


@pytest.mark.parametrize("settings", [{}, {"max_steps": 1}])
def test_a_cancel_is_heard_in_an_evaluation(
    settings: dict[str, Any], plant: Plant, monkeypatch: pytest.MonkeyPatch
) -> None:
    """1 000 batches, of which each takes 0.05 s."""
    held_out = plant.file(counting_examples(1000), "held-out.jsonl")
    job = plant.submit(settings={"batch_size": 1, **settings}, validation_file=held_out)
    batches = slowly(monkeypatch, lambda: plant.backlog.cancel(TENANT, job.id))
    plant.work()
    assert plant.get(job).status == "cancelled"
    assert len(batches) < 500
    assert not any("validation loss" in message for message in plant.messages(job))


def test_a_pause_in_the_last_evaluation_loses_no_step(
    plant: Plant, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = {"max_steps": 3, "eval_fraction": 0.5}
    job = plant.submit(settings=settings)
    whole = plant.submit(settings=settings, suffix="whole")
    stop = threading.Event()

    with Store(plant.data, plant.info) as store:
        made = worker_on(plant, store, "Step 3/3", lambda _: stop.set())
        assert made.run(stop) == 1
    released = plant.get(job)
    assert (released.status, released.attempt) == ("queued", 0)
    (checkpoint,) = (plant.data / "work" / job.id).rglob("checkpoint-3")
    assert (checkpoint / "complete").exists()
    plant.work()
    one, other = plant.get(job), plant.get(whole)
    assert (one.status, other.status) == ("succeeded", "succeeded")
    assert one.digest == other.digest
    said = [message for message in plant.messages(job) if "loss" in message]
    assert sum(message.startswith("Step 3/3") for message in said) == 1
    assert sum("validation loss" in message for message in said) == 2
    assert [m for m in said if "loss" in m and "Step 3" in m] == [
        m for m in plant.messages(whole) if "loss" in m and "Step 3" in m
    ]


def test_a_stop_is_heard_while_the_examples_are_tokenised(
    plant: Plant, monkeypatch: pytest.MonkeyPatch
) -> None:
    from gossamer.training import encode

    job = plant.submit(file=plant.file(counting_examples(5000)))
    stop, seen = threading.Event(), []
    original = encode._encoded

    def encoded(*given: Any) -> Encoded:
        seen.append(1)
        stop.set()
        return original(*given)

    monkeypatch.setattr(encode, "_encoded", encoded)
    plant.work(stop=stop)
    assert plant.get(job).status == "queued"
    assert len(seen) < 1000
    monkeypatch.undo()
    plant.work()
    assert plant.get(job).status == "succeeded"


def test_tokens_are_those_of_all_phases(plant: Plant, monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[int | None] = []
    stop = threading.Event()
    stepped = attempt.Attempt.stepped

    def telling(self: attempt.Attempt, event: Any) -> None:
        stepped(self, event)
        told.append(self.progress.trained_tokens if self.progress else None)
        if len(told) == 5:  # in the second phase, in which it goes on
            stop.set()

    monkeypatch.setattr(attempt.Attempt, "stepped", telling)
    parameters = {"calibration_steps": 4, "targets": "q"}
    job = plant.submit("lota", parameters, settings={"max_steps": 4})
    plant.work(stop=stop)
    before = plant.get(job).status
    plant.work()
    done = plant.get(job)
    assert (before, done.status) == ("queued", "succeeded")
    assert len(told) == 8
    assert told == sorted({tokens or 0 for tokens in told})
    assert told[-1] == done.trained_tokens
