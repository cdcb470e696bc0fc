"""Cancel, pause, resume: what a tenant asks, and what becomes of the job."""

from __future__ import annotations

from pathlib import Path

import pytest

from gossamer.jobs.errors import CancelRequested, JobStateError, LeaseLost
from gossamer.jobs.views import JobError
from tests.jobs.support import LEASE, Bench
from tests.store.support import stored_blobs


def test_a_queued_job_is_cancelled_at_once(bench: Bench) -> None:
    job = bench.submit()
    assert bench.backlog.cancel("acme", job.id).status == "cancelled"
    bench.clock.advance(9)
    assert bench.backlog.cancel("acme", job.id).finished_at == job.created_at  # and once
    assert bench.messages(job)[1:] == ["The job is cancelled."]
    assert bench.backlog.claim("w", LEASE) is None


def test_a_running_job_is_cancelled_by_its_worker(bench: Bench) -> None:
    claim = bench.running()
    for _ in range(2):
        job = bench.backlog.cancel("acme", claim.job.id)
        assert (job.status, job.wanted) == ("running", "cancel")
    assert bench.backlog.heartbeat(claim, LEASE) == "cancel"
    bench.backlog.cancelled(claim)
    assert (bench.get(claim).status, bench.get(claim).wanted) == ("cancelled", None)
    assert bench.messages(claim)[2:] == [
        "The worker is asked to cancel the job.",
        "The job is cancelled.",
    ]
    with pytest.raises(LeaseLost):
        bench.backlog.cancelled(claim)


def test_a_job_whose_cancel_was_acknowledged_cannot_succeed(bench: Bench, tmp_path: Path) -> None:
    claim = bench.running()
    bench.backlog.cancel("acme", claim.job.id)
    blobs = stored_blobs(tmp_path)
    with pytest.raises(CancelRequested):
        bench.finish(claim)
    assert bench.store.catalog.list("acme") == []
    assert stored_blobs(tmp_path) == blobs
    bench.backlog.cancelled(claim)
    assert bench.get(claim).status == "cancelled"


def test_a_worker_cannot_cancel_by_itself(bench: Bench) -> None:
    claim = bench.running()
    with pytest.raises(RuntimeError, match="nobody wants"):
        bench.backlog.cancelled(claim)
    assert bench.get(claim).status == "running"


@pytest.mark.parametrize("action", ["cancel", "pause"])
def test_a_dead_workers_job_obeys_at_once(bench: Bench, action: str) -> None:
    claim = bench.running()
    bench.clock.advance(LEASE)
    job = getattr(bench.backlog, action)("acme", claim.job.id)
    assert job.status == {"cancel": "cancelled", "pause": "paused"}[action]
    with pytest.raises(LeaseLost):
        bench.backlog.heartbeat(claim, LEASE)


@pytest.mark.parametrize("action", ["cancel", "pause"])
def test_what_a_worker_died_over_the_next_one_carries_out(bench: Bench, action: str) -> None:
    claim = bench.running()
    getattr(bench.backlog, action)("acme", claim.job.id)
    bench.clock.advance(LEASE)
    assert bench.backlog.claim("w2", LEASE) is None
    assert bench.get(claim).status == {"cancel": "cancelled", "pause": "paused"}[action]


def test_a_queued_job_is_paused_and_resumed_at_once(bench: Bench) -> None:
    job = bench.submit()
    for _ in range(2):
        assert bench.backlog.pause("acme", job.id).status == "paused"
    assert bench.backlog.claim("w", LEASE) is None
    for _ in range(2):
        assert bench.backlog.resume("acme", job.id).status == "queued"
    assert bench.messages(job)[1:] == ["The job is paused.", "The job is queued."]
    assert bench.claim().job.id == job.id


def test_a_running_job_is_paused_by_its_worker_and_costs_no_attempt(bench: Bench) -> None:
    job = bench.submit()
    for _ in range(7):
        claim = bench.claim()
        assert bench.backlog.pause("acme", job.id).wanted == "pause"
        assert bench.backlog.heartbeat(claim, LEASE) == "pause"
        bench.backlog.paused(claim)
        assert bench.get(job).status == "paused"
        bench.backlog.resume("acme", job.id)
    assert bench.claim().job.attempt == 1


def test_a_pause_can_be_taken_back(bench: Bench) -> None:
    claim = bench.running()
    bench.backlog.pause("acme", claim.job.id)
    assert bench.backlog.resume("acme", claim.job.id).wanted is None
    assert bench.backlog.heartbeat(claim, LEASE) == "continue"


def test_a_pause_taken_back_too_late_puts_the_job_into_the_queue(bench: Bench) -> None:
    claim = bench.running()
    bench.backlog.pause("acme", claim.job.id)
    assert bench.backlog.heartbeat(claim, LEASE) == "pause"
    bench.backlog.resume("acme", claim.job.id)
    bench.backlog.paused(claim)
    assert bench.get(claim).status == "queued"


@pytest.mark.parametrize("leave", ["paused", "release"])
def test_a_cancel_meanwhile_is_heard_when_the_worker_leaves(bench: Bench, leave: str) -> None:
    claim = bench.running()
    bench.backlog.pause("acme", claim.job.id)
    bench.backlog.cancel("acme", claim.job.id)
    getattr(bench.backlog, leave)(claim)
    assert bench.get(claim).status == "cancelled"


def test_a_paused_job_can_be_cancelled(bench: Bench) -> None:
    job = bench.submit()
    bench.backlog.pause("acme", job.id)
    assert bench.backlog.cancel("acme", job.id).status == "cancelled"


def test_what_does_not_apply_is_refused_and_says_why(bench: Bench) -> None:
    claim = bench.running()
    bench.backlog.cancel("acme", claim.job.id)
    for action in ("pause", "resume"):
        with pytest.raises(JobStateError) as caught:
            getattr(bench.backlog, action)("acme", claim.job.id)
        assert (caught.value.action, caught.value.status) == (action, "cancelling")
    bench.backlog.cancelled(claim)
    succeeded, failed = bench.running(), bench.running()
    bench.finish(succeeded)
    bench.backlog.fail(failed, JobError("x", "x"))
    for ended, status in ((claim, "cancelled"), (succeeded, "succeeded"), (failed, "failed")):
        for action in ("cancel", "pause", "resume"):
            if (status, action) == ("cancelled", "cancel"):
                continue
            with pytest.raises(JobStateError, match=status):
                getattr(bench.backlog, action)("acme", ended.job.id)
        assert bench.get(ended).status == status
