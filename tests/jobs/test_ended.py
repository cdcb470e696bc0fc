"""Which jobs have ended, and what a tenant wants, asked without writing."""

from __future__ import annotations

import pytest

from gossamer.jobs.errors import LeaseLost
from gossamer.jobs.lease import Lease
from gossamer.jobs.views import JobError, Progress
from tests.jobs.support import LEASE, Bench, everything


def test_ended_are_finished_jobs_and_those_that_nobody_knows(bench: Bench) -> None:
    queued, paused, cancelled = (bench.submit(suffix=name) for name in ("q", "p", "c"))
    bench.backlog.pause("acme", paused.id)
    bench.backlog.cancel("acme", cancelled.id)
    failed = bench.claim()
    assert failed.job.id == queued.id
    others = bench.submit("zeta")
    running = bench.claim("w2")
    assert running.job.id == others.id
    unknown = "ftjob-" + "0" * 24
    asked = [queued.id, paused.id, cancelled.id, others.id, unknown, "notes", "", "../x", "ftjob-1"]
    assert bench.backlog.ended(asked) == {cancelled.id, unknown}
    bench.backlog.fail(failed, JobError("x", "y"))
    bench.finish(running)
    assert bench.backlog.ended(asked) == {cancelled.id, unknown, queued.id, others.id}
    assert bench.backlog.ended([]) == frozenset()


def test_a_dead_workers_job_has_not_ended(bench: Bench) -> None:
    claim = bench.running()
    bench.clock.advance(10 * LEASE)
    assert bench.backlog.ended([claim.job.id]) == frozenset()


def test_a_look_says_what_is_wanted_and_writes_nothing(bench: Bench) -> None:
    claim = bench.running()
    lease = Lease(bench.backlog, claim, LEASE, since=0.0)
    assert lease.look() == "continue"
    bench.backlog.pause("acme", claim.job.id)
    before = everything(bench.store.registry)
    with bench.store.registry.write():  # nor waits for who writes
        assert lease.look() == "pause"
    assert everything(bench.store.registry) == before
    bench.backlog.cancel("acme", claim.job.id)
    assert lease.look() == "cancel"


def test_a_look_at_anothers_job_says_so(bench: Bench) -> None:
    claim = bench.running()
    bench.clock.advance(LEASE)
    bench.claim("w2")
    with pytest.raises(LeaseLost):
        bench.backlog.wanted(claim)
    ended = bench.running(suffix="other")
    bench.finish(ended)
    with pytest.raises(LeaseLost):
        bench.backlog.wanted(ended)


def test_tokens_that_were_told_are_not_taken_back(bench: Bench) -> None:
    """An attempt repeats what the one before it had not kept."""
    claim = bench.running()
    told = []
    for tokens in (100, 900, None):
        bench.backlog.heartbeat(claim, LEASE, Progress(1, 10, trained_tokens=tokens))
        told.append(bench.get(claim).trained_tokens)
    bench.clock.advance(LEASE)
    again = bench.claim("w2")
    for tokens in (600, 1200):
        bench.backlog.heartbeat(again, LEASE, Progress(1, 10, trained_tokens=tokens))
        told.append(bench.get(claim).trained_tokens)
    assert told == [100, 900, 900, 900, 1200]
