"""A worker that lost its job changes nothing, whatever it does and however it lost it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from gossamer.jobs.errors import LeaseLost
from gossamer.jobs.views import Claim, JobError, Progress
from tests.jobs.support import LEASE, Bench, everything
from tests.store.support import make_file, push, push_file, stored_blobs


def upload_result(bench: Bench, claim: Claim) -> None:
    also = bench.backlog.attaching(claim)
    push_file(bench.store.files, "r.csv", b"r", purpose="fine-tune-results", also=also)


def upload_checkpoint(bench: Bench, claim: Claim) -> None:
    also = bench.backlog.checkpointing(claim, 20, {"train_loss": 0.5})
    push(bench.store.catalog, claim.job.adapter, 2, tag="step-20", also=also)


WRITES: dict[str, Callable[[Bench, Claim], object]] = {
    "heartbeat": lambda b, c: b.backlog.heartbeat(c, LEASE, Progress(1, 2)),
    "event": lambda b, c: b.backlog.event(c, "info", "still here"),
    "metrics": lambda b, c: b.backlog.event(c, "info", "m", {"step": 1}),
    "fail": lambda b, c: b.backlog.fail(c, JobError("x", "x")),
    "cancelled": lambda b, c: b.backlog.cancelled(c),
    "paused": lambda b, c: b.backlog.paused(c),
    "release": lambda b, c: b.backlog.release(c),
    "checkpoint": upload_checkpoint,
    "result file": upload_result,
    "new version": lambda b, c: b.finish(c, seed=3),
    "version that is there": lambda b, c: b.finish(c, seed=1),
}


def taken_over(bench: Bench, zombie: Claim) -> None:
    bench.clock.advance(LEASE)
    bench.claim("w2")


def taken_over_and_to_be_cancelled(bench: Bench, zombie: Claim) -> None:
    taken_over(bench, zombie)
    bench.backlog.cancel("acme", zombie.job.id)


def finished_by_another(bench: Bench, zombie: Claim) -> None:
    bench.clock.advance(LEASE)
    bench.finish(bench.claim("w2"), seed=1)


def released(bench: Bench, zombie: Claim) -> None:
    bench.backlog.release(zombie)


def claimed_again_by_itself(bench: Bench, zombie: Claim) -> None:
    bench.backlog.release(zombie)
    bench.claim("w1")


def cancelled(bench: Bench, zombie: Claim) -> None:
    bench.clock.advance(LEASE)
    bench.backlog.cancel("acme", zombie.job.id)


def paused_and_resumed(bench: Bench, zombie: Claim) -> None:
    bench.clock.advance(LEASE)
    bench.backlog.pause("acme", zombie.job.id)
    bench.backlog.resume("acme", zombie.job.id)


@pytest.mark.parametrize(
    "lose",
    [
        taken_over,
        taken_over_and_to_be_cancelled,
        finished_by_another,
        released,
        claimed_again_by_itself,
        cancelled,
        paused_and_resumed,
    ],
)
def test_every_write_of_a_zombie_is_refused_and_changes_nothing(
    bench: Bench, tmp_path: Path, lose: Callable[[Bench, Claim], None]
) -> None:
    zombie = bench.running(suffix="sql")
    push(bench.store.catalog, "sql", 1)
    upload_checkpoint(bench, zombie)
    upload_result(bench, zombie)
    lose(bench, zombie)
    before, blobs = everything(bench.store.registry), stored_blobs(tmp_path)
    for name, write in WRITES.items():
        with pytest.raises(LeaseLost) as caught:
            write(bench, zombie)
        assert caught.value.job_id == zombie.job.id
        assert everything(bench.store.registry) == before, name
        assert stored_blobs(tmp_path) == blobs, name


@pytest.mark.parametrize("name", [n for n in WRITES if n != "cancelled"])
def test_the_same_writes_of_the_worker_that_has_the_job_change_something(
    bench: Bench, name: str
) -> None:
    claim = bench.running(suffix="sql")
    push(bench.store.catalog, "sql", 1)
    before = everything(bench.store.registry)
    bench.clock.advance(1)
    WRITES[name](bench, claim)
    assert everything(bench.store.registry) != before


def test_a_zombie_in_a_process_that_is_no_owner_leaves_no_blob_for_long(
    bench: Bench, tmp_path: Path
) -> None:
    from gossamer.store.catalog.opening import Store
    from tests.store.support import BASE

    zombie = bench.running(suffix="sql")
    taken_over(bench, zombie)
    blobs = stored_blobs(tmp_path)
    with Store(tmp_path, BASE) as worker, pytest.raises(LeaseLost):
        worker.catalog.upload("acme", "sql", [make_file(1)], also=bench.backlog.finishing(zombie))
    assert len(stored_blobs(tmp_path)) == len(blobs) + 1
    bench.store.catalog.recover()
    assert stored_blobs(tmp_path) == blobs
