"""The checkpoints of whole jobs: how many stay, and what a job does at the edge of a quota."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from gossamer.api.settings import Limits, Settings
from gossamer.cli.destination import Destination
from gossamer.cli.output import Output
from gossamer.jobs.backlog import Backlog
from gossamer.jobs.views import Job, JobLimits
from gossamer.store.catalog.opening import Store
from gossamer.store.catalog.views import StoreLimits
from gossamer.store.delta import Delta, DeltaSet
from gossamer.training.worker import Worker
from tests.worker.support import TENANT, Plant, planted

EACH = {"max_steps": 12, "checkpoint_steps": 1}
#: So many values that a file is as large as they are: a result has a longer record.
DENSE = {"density": 0.2, "targets": "all-linear"}


@pytest.fixture
def plant(tmp_path: Path, tiny_dir: Callable[..., Path]) -> Iterator[Plant]:
    with planted(tmp_path / "data", tiny_dir("llama")) as made:
        yield made


def work(plant: Plant, stored_bytes: int, limits: JobLimits | None = None) -> None:
    """A worker whose tenants have so much room, until the queue is empty."""
    with Store(plant.data, plant.info, limits=StoreLimits(stored_bytes=stored_bytes)) as store:
        backlog = Backlog(store.registry, limits=limits)
        worker = Worker(store, plant.base, backlog, plant.data / "work", name="here")
        worker.run(threading.Event(), once=True)


def steps(plant: Plant, job: Job) -> list[int]:
    return [c.step for c in plant.backlog.checkpoints(TENANT, job.id, limit=100, order="asc").items]


def warnings(plant: Plant, job: Job) -> list[str]:
    events = plant.backlog.events(TENANT, job.id, limit=1000, order="asc").items
    return [event.message for event in events if event.level == "warn"]


def test_a_job_keeps_its_last_ones(plant: Plant) -> None:
    usual, other = (plant.submit(settings=EACH, suffix=name) for name in ("a", "b"))
    work(plant, 1 << 30)
    assert steps(plant, usual) == [7, 8, 9, 10, 11]
    assert steps(plant, other) == [7, 8, 9, 10, 11]
    fewer = plant.submit(settings=EACH, suffix="d")
    work(plant, 1 << 30, JobLimits(checkpoints=1))
    assert steps(plant, fewer) == [11]
    labels = [v.label for v in plant.store.catalog.show(TENANT, "d").versions]
    assert labels == ["d@step-11", "d:1"]
    # What it let go of is garbage, which the server collects as it does what is deleted elsewhere.
    assert plant.store.catalog.recover().blobs == 6, "equal files are one"


def test_at_the_edge_of_the_quota_the_training_goes_on_without_them(plant: Plant) -> None:
    first = plant.submit(
        parameters=DENSE, settings={**EACH, "checkpoint_steps": 100}, suffix="first"
    )
    work(plant, 1 << 30)
    used = plant.store.catalog.usage(TENANT).stored_bytes
    job = plant.submit(parameters=DENSE, settings={**EACH, "checkpoint_steps": 5}, suffix="second")
    work(plant, int(2.1 * used))  # for the result, and not for a checkpoint beside it
    done = plant.get(job)
    assert (plant.get(first).status, done.status) == ("succeeded", "succeeded")
    assert done.digest == plant.get(first).digest
    assert steps(plant, job) == []
    (warning,) = warnings(plant, job)
    assert warning.startswith("No room for the checkpoint of step 5 beside the result")
    assert plant.store.catalog.usage(TENANT).adapters == 2


def test_a_result_without_room_fails_its_job_and_leaves_nothing(plant: Plant) -> None:
    plant.submit(parameters=DENSE, settings={**EACH, "checkpoint_steps": 100}, suffix="first")
    work(plant, 1 << 30)
    usage = plant.store.catalog.usage(TENANT)
    job = plant.submit(parameters=DENSE, settings=EACH, suffix="second")
    work(plant, int(1.5 * usage.stored_bytes))
    failed = plant.get(job)
    assert failed.status == "failed"
    assert failed.error is not None
    assert failed.error.code == "quota_exceeded"
    assert "delete an adapter or a version" in failed.error.message
    assert plant.store.catalog.usage(TENANT) == usage
    assert [adapter.name for adapter in plant.store.catalog.list(TENANT)] == ["first"]
    assert not list((plant.data / "work").iterdir())


def test_those_of_a_local_run_that_a_job_begins_with_stay(plant: Plant) -> None:
    """`gossamer train --push kept --set checkpoint_steps=1`, with a queued job on `kept@step-1`."""
    settings = Settings(
        data_dir=plant.data, base=str(plant.base.path), first_tenant=TENANT,
        limits=Limits(checkpoints_per_job=1),
    )  # fmt: skip
    goal = Destination(settings, "kept", None, TENANT, activate=True, url=None, key="")
    goal.check(plant.base)
    weight = "model.layers.0.self_attn.q_proj.weight"
    for step in range(1, 5):
        delta = Delta.element(
            plant.info.table[weight], np.array([step]), np.ones(1, np.float32), value_dtype="F32"
        )
        made = DeltaSet(plant.base.fingerprint, plant.base.name, {weight: delta})
        goal.keep_checkpoint(Output(as_json=False), step, made, {})
        if step == 1:
            first = plant.store.catalog.show(TENANT, "kept")
            begun = {"kept@step-1": f"kept@{first.versions[0].digest}"}
            plant.submit(parameters={"init_from": "kept@step-1"}, references=begun)
    labels = [version.label for version in plant.store.catalog.show(TENANT, "kept").versions]
    assert labels == ["kept@step-1", "kept@step-4"]
