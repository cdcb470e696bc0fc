"""Whole jobs: trained, told about, handed in; failed in words; paused, cancelled, released."""

from __future__ import annotations

import csv
import io
import threading
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest

from gossamer.jobs.backlog import Backlog
from gossamer.store.catalog.opening import Store
from gossamer.store.clock import utc_now
from gossamer.store.format import digest
from gossamer.training import TrainConfig
from gossamer.training.run import TrainResult, train
from gossamer.training.worker import Worker
from tests.training.support import counting_examples, write_jsonl
from tests.worker.support import SETTINGS, TENANT, Plant, planted


@pytest.fixture
def plant(tmp_path: Path, tiny_dir: Callable[..., Path]) -> Iterator[Plant]:
    with planted(tmp_path / "data", tiny_dir("llama")) as made:
        yield made


METHODS: list[tuple[str, dict[str, Any]]] = [
    ("sparta", {"density": 0.05}),
    ("lota", {"sparsity": 0.9}),
    ("mcs", {"keep_ratio": 0.1, "period": 2}),
]


@pytest.mark.parametrize(("method", "parameters"), METHODS)
def test_a_job_makes_what_a_run_makes(
    method: str, parameters: dict[str, Any], plant: Plant, tmp_path: Path
) -> None:
    job = plant.submit(method, parameters, settings={"eval_fraction": 0.25})
    assert plant.work() == 1
    done = plant.get(job)
    assert done.status == "succeeded"
    assert done.error is None
    assert (done.fine_tuned_model, done.version) == ("made", "made:1")
    data = write_jsonl(tmp_path / "data.jsonl", counting_examples())
    config = TrainConfig.of(
        data=data, method=method, parameters=parameters, seed=5, eval_fraction=0.25, **SETTINGS
    )
    alone = train(config, plant.base)
    assert done.digest == digest(alone.delta_set)
    assert digest(plant.store.catalog.open(done.digest)) == done.digest
    assert done.trained_tokens == alone.tokens
    assert (done.step, done.steps) == (len(alone.losses), len(alone.losses))
    messages = plant.messages(job)
    assert f"{method} trains" in " ".join(messages)
    assert messages[-1] == "The job succeeded: made:1."
    (file,) = done.result_files
    with plant.store.files.content(TENANT, file) as path:
        rows = list(csv.DictReader(io.StringIO(path.read_text())))
    assert [float(row["train_loss"]) for row in rows if row["train_loss"]] == list(alone.losses)
    assert len([row for row in rows if row["valid_loss"]]) == 2
    assert not list((plant.data / "work").glob("*")), "nobody goes on from a finished job"


def test_a_chain_of_tasks(plant: Plant) -> None:
    plant.submit("lota", {"sparsity": 0.9}, suffix="first")
    plant.work()
    parent = plant.store.catalog.show(TENANT, "first").versions[0]
    given = {"parents": ["first"], "sparsity": 0.9}
    references = {"first": f"first@{parent.digest}"}
    job = plant.submit("lotto", given, suffix="second", references=references)
    # What the name means later is another thing.
    plant.submit("sparta", {"density": 0.01}, suffix="first")
    assert plant.work() == 2
    child = plant.store.catalog.open(plant.get(job).digest or "")
    assert child.record["chain"][0]["digest"] == parent.digest
    assert child.nnz == 2 * parent.nnz


def test_a_file_that_cannot_be_used_is_the_jobs_failure(plant: Plant) -> None:
    lines = [*counting_examples(3), {"prompt": "a", "completion": 5}]
    job = plant.submit(file=plant.file(lines))
    plant.work()
    failed = plant.get(job)
    assert failed.status == "failed"
    assert failed.error is not None
    assert (failed.error.code, failed.error.param) == ("invalid_training_file", "training_file")
    assert "line 4, completion" in failed.error.message
    assert str(plant.data) not in failed.error.message
    bad = plant.submit(validation_file=plant.file(b"not json\n"))
    plant.work()
    error = plant.get(bad).error
    assert error is not None
    assert (error.param, "line 1" in error.message) == ("validation_file", True)


@pytest.mark.parametrize(
    ("method", "parameters", "settings", "code", "param"),
    [
        ("sparta", {"targets": "nothing"}, {}, "invalid_parameter", "adapter.targets"),
        ("sparta", {"density": 0.9, "targets": "v"}, {}, "invalid_parameter", "adapter.density"),
        ("sparta", {}, {"learning_rate": 10.0, "warmup": 0, "learning_rate_multiplier": 1000.0,
                        "max_steps": 200}, "training_diverged", "hyperparameters"),
        ("mcs", {"warmup_steps": 50}, {}, "invalid_parameter", "adapter.warmup_steps"),
        ("sparta", {"init_from": "nobody"}, {}, "invalid_adapter", "adapter.init_from"),
        ("sparta", {}, {"eval_fraction": 0.001}, "invalid_parameter",
         "hyperparameters.eval_fraction"),
    ],
)  # fmt: skip
def test_what_cannot_be_done_is_said_and_the_next_job_is_served(
    method: str,
    parameters: dict[str, Any],
    settings: dict[str, Any],
    code: str,
    param: str,
    plant: Plant,
) -> None:
    job = plant.submit(method, parameters, settings=settings)
    good = plant.submit(suffix="good")
    assert plant.work() == 2
    error = plant.get(job).error
    assert error is not None
    assert (error.code, error.param) == (code, param)
    assert plant.get(good).status == "succeeded"


def test_a_full_disk_fails_the_job_with_a_reason(
    plant: Plant, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("gossamer.training.run.TrainResult.save", full)
    job = plant.submit()
    plant.work()
    error = plant.get(job).error
    assert error is not None
    assert error.code == "disk_full"
    assert plant.store.catalog.show(TENANT, "made").current is None, "checkpoints only"


def test_a_full_disk_of_a_lost_job_leaves_its_next_attempt_alone(
    plant: Plant, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A worker that slept past its lease finds the disk full when it wakes up."""
    job = plant.submit(settings={"max_steps": 3})
    others, may_end = threading.Event(), threading.Event()
    save, left = TrainResult.save, []

    def later() -> None:
        """Another worker, for which the lease has ended."""
        with Store(plant.data, plant.info) as store:
            backlog = Backlog(store.registry, clock=lambda: utc_now() + timedelta(hours=1))
            worker = Worker(store, plant.base, backlog, plant.data / "work", name="other")
            assert worker.run(threading.Event(), once=True) == 1

    thread = threading.Thread(target=later)

    def saving(self: TrainResult, target: Any) -> Any:
        if threading.current_thread() is thread:
            others.set()
            assert may_end.wait(60)
            return save(self, target)
        thread.start()
        assert others.wait(60)
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(TrainResult, "save", saving)
    try:
        assert plant.work() == 1
        left = [path.name for path in (plant.data / "work" / job.id).iterdir()]
    finally:
        may_end.set()
        thread.join()
    assert len(left) == 1
    done = plant.get(job)
    assert (done.status, done.error, done.attempt) == ("succeeded", None, 2)
    assert digest(plant.store.catalog.open(done.digest or "")) == done.digest


class AfterSteps:
    """An event that is set once a job has made some steps."""

    def __init__(self, plant: Plant, job: Any, steps: int, do: Callable[[], Any]) -> None:
        self._thread = threading.Thread(target=self._watch, args=(plant, job, steps, do))
        self._thread.start()

    def _watch(self, plant: Plant, job: Any, steps: int, do: Callable[[], Any]) -> None:
        plant.wait(job, lambda now: (now.step or 0) >= steps)
        do()

    def join(self) -> None:
        self._thread.join()


SLOW = {"max_steps": 400, "learning_rate": 1e-4}


def test_pause_resume_and_the_same_result(plant: Plant) -> None:
    settings = {"max_steps": 60}
    job = plant.submit(settings={**settings, "learning_rate": 1e-3})
    whole = plant.submit(settings={**settings, "learning_rate": 1e-3}, suffix="whole")
    # Both have one seed, and differ by the name alone.
    pausing = AfterSteps(plant, job, 1, lambda: plant.backlog.pause(TENANT, job.id))
    plant.work(lease_s=0.6)
    pausing.join()
    if plant.get(job).status == "paused":
        assert plant.get(job).attempt == 0
        plant.backlog.resume(TENANT, job.id)
        plant.work()
    one, other = plant.get(job), plant.get(whole)
    assert (one.status, other.status) == ("succeeded", "succeeded")
    assert one.digest == other.digest


def test_a_cancelled_job_leaves_nothing(plant: Plant) -> None:
    job = plant.submit(settings=SLOW)
    cancelling = AfterSteps(plant, job, 1, lambda: plant.backlog.cancel(TENANT, job.id))
    plant.work(lease_s=0.6)
    cancelling.join()
    assert plant.get(job).status == "cancelled"
    assert all(adapter.current is None for adapter in plant.store.catalog.list(TENANT))
    assert not list((plant.data / "work").glob("*"))


def test_a_worker_that_stops_gives_its_job_back(plant: Plant) -> None:
    job = plant.submit(settings=SLOW)
    stop = threading.Event()
    stopping = AfterSteps(plant, job, 1, stop.set)
    plant.work(stop=stop, lease_s=0.6)
    stopping.join()
    released = plant.get(job)
    assert (released.status, released.attempt) == ("queued", 0)
    assert list((plant.data / "work" / job.id).glob("*")), "to go on from"


def test_checkpoints_can_be_tried_and_are_never_current(plant: Plant) -> None:
    job = plant.submit(settings={"checkpoint_steps": 3})
    plant.work()
    page = plant.backlog.checkpoints(TENANT, job.id, order="asc")
    assert [(c.step, c.model) for c in page.items] == [(3, "made@step-3"), (6, "made@step-6")]
    final = plant.get(job)
    for checkpoint in page.items:
        assert checkpoint.digest != final.digest
        assert plant.store.catalog.open(checkpoint.digest).nnz
        assert checkpoint.metrics["train_loss"] > 0
    assert plant.store.catalog.show(TENANT, "made").current == 1
