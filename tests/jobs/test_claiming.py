"""The backlog's door for workers: whose job is next, leases, clocks, heartbeats."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path

import pytest

from gossamer.jobs.errors import LeaseLost
from gossamer.jobs.views import JobError, JobLimits, Progress
from tests.jobs.support import LEASE, Bench, benched

# ---- claim


def test_a_claim_makes_a_job_run(bench: Bench) -> None:
    submitted = bench.submit()
    bench.clock.advance(5)
    claim = bench.claim("host-1:77")
    job = bench.get(submitted)
    assert claim.job == job
    assert (job.status, job.attempt, job.started_at) == ("running", 1, bench.clock.now)
    assert bench.backlog.claim("w2", LEASE) is None
    assert bench.messages(job)[1:] == ["A worker begins."]


def test_a_worker_of_another_base_leaves_the_job_alone(bench: Bench) -> None:
    job = bench.submit()
    assert bench.backlog.claim("w", LEASE, base_fingerprint="sha256:other") is None
    claim = bench.backlog.claim("w", LEASE, base_fingerprint=job.base_fingerprint)
    assert claim is not None
    assert claim.job.id == job.id


def test_tenants_take_turns(bench: Bench) -> None:
    a = [bench.submit("acme") for _ in range(4)]
    z = [bench.submit("zeta") for _ in range(2)]
    order = []
    for _ in range(6):
        claim = bench.claim()
        order.append(claim.job.id)
        bench.clock.advance(1)
        bench.backlog.fail(claim, JobError("x", "x"))
    assert order == [a[0].id, z[0].id, a[1].id, z[1].id, a[2].id, a[3].id]


def test_a_tenant_with_nothing_running_goes_first(bench: Bench) -> None:
    a, z = [bench.submit("acme") for _ in range(3)], bench.submit("zeta")
    first = bench.claim()
    bench.backlog.fail(bench.claim(), JobError("x", "x"))  # zeta's turn was the last
    assert bench.get(z, "zeta").status == "failed"
    later = bench.submit("zeta")
    assert first.job.id == a[0].id
    assert bench.claim().job.id == later.id
    assert bench.claim().job.id == a[1].id


def test_an_expired_lease_passes_the_job_on(bench: Bench) -> None:
    old = bench.running()
    bench.clock.advance(LEASE - 1)
    assert bench.backlog.claim("w2", LEASE) is None
    bench.clock.advance(1)
    new = bench.claim("w2")
    assert (new.job.id, new.job.attempt) == (old.job.id, 2)
    assert new.fence > old.fence
    with pytest.raises(LeaseLost) as caught:
        bench.backlog.heartbeat(old, LEASE)
    assert (caught.value.job_id, caught.value.worker) == (old.job.id, "w1")
    assert bench.backlog.heartbeat(new, LEASE) == "continue"
    assert new.job.started_at == old.job.started_at
    assert bench.messages(new)[-1] == "A worker begins, attempt 2."


def test_a_heartbeat_keeps_the_job_even_a_late_one(bench: Bench) -> None:
    claim = bench.running()
    for _ in range(5):
        bench.clock.advance(LEASE - 1)
        assert bench.backlog.heartbeat(claim, LEASE) == "continue"
        assert bench.backlog.claim("w2", LEASE) is None
    bench.clock.advance(LEASE + 1)  # nobody has taken it
    assert bench.backlog.heartbeat(claim, LEASE) == "continue"
    assert bench.backlog.claim("w2", LEASE) is None


def test_a_job_that_kills_its_workers_fails(tmp_path: Path) -> None:
    with benched(tmp_path, JobLimits(max_attempts=3)) as bench:
        job = bench.submit()
        for attempt in (1, 2, 3):
            assert bench.claim().job.attempt == attempt
            bench.clock.advance(LEASE)
        other = bench.submit("zeta")
        assert bench.claim().job.id == other.id
        job = bench.get(job)
        assert (job.status, job.finished_at) == ("failed", bench.clock.now)
        assert job.error is not None
        assert (job.error.code, job.error.param) == ("worker_lost", None)
        assert "3 workers" in job.error.message
        assert bench.messages(job)[-1].startswith("The job failed: 3 workers")


def test_a_worker_that_stops_costs_no_attempt_and_no_turn(bench: Bench) -> None:
    a, z = bench.submit("acme"), bench.submit("zeta")
    for _ in range(7):
        claim = bench.claim()
        assert (claim.job.id, claim.job.attempt) == (a.id, 1)
        bench.clock.advance(1)
        bench.backlog.release(claim)
        assert bench.get(a).status == "queued"
    with pytest.raises(LeaseLost):
        bench.backlog.release(claim)
    bench.claim()
    assert bench.claim().job.id == z.id


# ---- clocks


def test_a_clock_that_jumps_ahead_costs_an_attempt_and_no_result(bench: Bench) -> None:
    claim = bench.running()
    bench.clock.advance(86400)
    other = bench.claim("w2")
    with pytest.raises(LeaseLost):
        bench.finish(claim)
    bench.finish(other)
    assert bench.get(claim).version == f"{claim.job.adapter}:1"


def test_a_clock_that_jumps_back_delays_no_more_than_a_lease(bench: Bench) -> None:
    dead = bench.running()
    bench.clock.advance(-86400)
    assert bench.backlog.claim("w2", LEASE) is None  # and dates the lease anew
    bench.clock.advance(LEASE - 1)
    assert bench.backlog.claim("w2", LEASE) is None
    bench.clock.advance(1)
    assert bench.claim("w2").job.id == dead.job.id


def test_a_worker_that_lives_keeps_its_job_when_the_clock_jumps_back(bench: Bench) -> None:
    claim = bench.running()
    bench.clock.advance(-86400)
    for _ in range(5):
        assert bench.backlog.claim("w2", LEASE) is None
        bench.clock.advance(LEASE - 1)
        assert bench.backlog.heartbeat(claim, LEASE) == "continue"


def test_hosts_whose_clocks_differ_a_little_share_a_backlog(bench: Bench) -> None:
    claim = bench.running()
    bench.clock.advance(-2)
    assert bench.backlog.claim("w2", LEASE) is None
    bench.clock.advance(2 + LEASE - 0.001)
    assert bench.backlog.claim("w2", LEASE) is None  # the lease was not dated anew
    bench.clock.advance(0.001)
    assert bench.claim("w2").job.id == claim.job.id


# ---- progress


def test_a_heartbeat_reports_progress(bench: Bench) -> None:
    claim = bench.running()
    progress = Progress(step=3, steps=10, loss=1.5, trained_tokens=700, remaining_s=60)
    bench.backlog.heartbeat(claim, LEASE, progress)
    job = bench.get(claim)
    assert (job.step, job.steps, job.loss, job.trained_tokens) == (3, 10, 1.5, 700)
    assert job.estimated_finish == bench.clock.now + timedelta(seconds=60)
    bench.backlog.heartbeat(claim, LEASE)
    assert bench.get(claim).step == 3
    bench.backlog.heartbeat(claim, LEASE, Progress(step=4, steps=10, loss=float("nan")))
    assert (bench.get(claim).step, bench.get(claim).loss) == (4, None)
