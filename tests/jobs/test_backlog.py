"""The backlog's door: what tenants and workers ask, and what they are answered."""

from __future__ import annotations

import sqlite3
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path

import pytest

from gossamer.jobs.backlog import Backlog
from gossamer.jobs.errors import (
    CancelRequested,
    JobNotFound,
    JobStateError,
    LeaseLost,
    TooManyJobs,
    UnknownCursor,
    UnusableFile,
)
from gossamer.jobs.views import JobError, JobLimits, Progress
from gossamer.store.catalog.errors import AdapterNotFound, FileNotFound, TenantNotFound
from gossamer.store.registry.database import Registry
from tests.jobs.support import LEASE, Bench, benched, count_rows
from tests.store.support import make_digest, make_file, push, push_file, rows, stored_blobs


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[Bench]:
    with benched(tmp_path) as bench:
        yield bench


# ---- submit


def test_a_job_is_queued_as_it_was_asked_for(bench: Bench) -> None:
    job = bench.backlog.submit(
        "acme",
        bench.request(
            method="lota",
            parameters={"sparsity": 0.99, "iterations": 2, "init_from": "sql*0.5"},
            settings={"n_epochs": 3, "batch_size": "auto"},
            references={"sql": f"sql@{make_digest(1)}"},
            suffix="my-sql",
            metadata={"team": "a"},
        ),
    )
    assert job.id.startswith("ftjob-")
    assert len(job.id) == len("ftjob-") + 24
    assert (job.tenant, job.status, job.adapter) == ("acme", "queued", "my-sql")
    assert job.request.method == "lota"
    assert job.request.parameters["sparsity"] == 0.99
    assert job.request.parameters["scope"] == "global"
    assert job.request.settings["epochs"] == 3
    assert job.request.references == {"sql": f"sql@{make_digest(1)}"}
    assert job.request.training_file == bench.files["acme"]
    assert job.request.metadata == {"team": "a"}
    assert job.created_at == bench.clock.now
    assert 0 <= job.seed < 2**31
    assert (job.attempt, job.step, job.error, job.fine_tuned_model) == (0, None, None, None)
    assert bench.get(job) == job
    assert bench.messages(job) == ["The job is queued, with the method lota."]


def test_a_job_without_a_suffix_gets_a_name(bench: Bench) -> None:
    names = {bench.submit().adapter for _ in range(5)}
    assert len(names) == 5
    assert all(name.startswith("ft-") for name in names)


def test_the_same_request_is_the_same_job_for_a_while(bench: Bench) -> None:
    request = bench.request(suffix="sql")
    first = bench.backlog.submit("acme", request)
    again = bench.request(suffix="sql", parameters={"density": 0.005}, settings={"n_epochs": 1})
    bench.clock.advance(59)
    assert bench.backlog.submit("acme", again) == first
    assert bench.backlog.submit("acme", bench.request(suffix="other")).id != first.id
    bench.clock.advance(2)
    assert bench.backlog.submit("acme", request).id != first.id


def test_a_request_is_the_same_job_whatever_became_of_it_but_not_a_cancelled_one(
    bench: Bench,
) -> None:
    request = bench.request()
    first = bench.backlog.submit("acme", request)
    claim = bench.claim()
    assert bench.backlog.submit("acme", request).status == "running"
    bench.backlog.fail(claim, JobError("bad_data", "line 3 is no JSON", "training_file"))
    assert bench.backlog.submit("acme", request).id == first.id
    job = bench.submit()
    bench.backlog.cancel("acme", job.id)
    anew = bench.backlog.submit("acme", bench.request(seed=job.seed))
    assert (anew.id != job.id, anew.status) == (True, "queued")


def test_a_clock_set_back_brings_no_old_job_back(bench: Bench) -> None:
    bench.clock.advance(7200)
    first = bench.backlog.submit("acme", bench.request())
    bench.clock.advance(-7200)
    assert bench.backlog.submit("acme", bench.request()).id != first.id


def test_equal_requests_of_two_tenants_are_two_jobs(bench: Bench) -> None:
    shared = {"seed": 1}
    mine, theirs = bench.submit("acme", **shared), bench.submit("zeta", **shared)
    assert mine.id != theirs.id


@pytest.mark.parametrize("param", ["training_file", "validation_file"])
def test_a_file_that_cannot_be_used_is_named_and_nothing_kept(bench: Bench, param: str) -> None:
    deleted = push_file(bench.store.files, "b", b"x").id
    bench.store.files.delete("acme", deleted)
    result = push_file(bench.store.files, "r", b"y", purpose="fine-tune-results").id
    answers = set()
    for file_id in (bench.files["zeta"], deleted, "file-" + "0" * 24, "\ud800"):
        with pytest.raises(UnusableFile) as caught:
            bench.submit(**{param: file_id})
        assert (caught.value.param, caught.value.file_id) == (param, file_id)
        answers.add(caught.value.why)
    assert len(answers) == 1
    with pytest.raises(UnusableFile, match="purpose"):
        bench.submit(**{param: result})
    assert count_rows(bench.store.registry, "jobs") == 0


def test_a_job_of_nobody_is_refused(bench: Bench) -> None:
    with pytest.raises(TenantNotFound):
        bench.backlog.submit("nobody", bench.request())


def test_unfinished_jobs_are_counted(tmp_path: Path) -> None:
    with benched(tmp_path, JobLimits(unfinished=2)) as bench:
        first, claim = bench.submit(), bench.claim()
        second = bench.submit()
        bench.backlog.pause("acme", second.id)
        with pytest.raises(TooManyJobs) as caught:
            bench.submit()
        assert caught.value.limit == 2
        bench.submit("zeta")
        bench.finish(claim)
        assert bench.get(first).status == "succeeded"
        bench.submit()


# ---- lists


def test_jobs_come_in_pages_newest_first(bench: Bench) -> None:
    jobs = [bench.submit() for _ in range(5)]
    bench.submit("zeta")
    page = bench.backlog.list("acme", limit=2)
    assert ([j.id for j in page.items], page.has_more) == ([jobs[4].id, jobs[3].id], True)
    page = bench.backlog.list("acme", limit=3, after=jobs[3].id)
    assert ([j.id for j in page.items], page.has_more) == ([j.id for j in jobs[2::-1]], False)


def test_jobs_are_filtered_by_metadata(bench: Bench) -> None:
    odd = {'a"b': "'; DROP TABLE jobs; --", "%": "_"}
    a = bench.submit(metadata={"team": "a", "size": "1"})
    b = bench.submit(metadata={"team": "a", **odd})
    c = bench.submit(metadata={})
    d = bench.submit()

    def ids(**options: object) -> list[str]:
        return [j.id for j in bench.backlog.list("acme", **options).items]  # type: ignore[arg-type]

    assert ids(metadata={"team": "a"}) == [b.id, a.id]
    assert ids(metadata={"team": "a", "size": "1"}) == [a.id]
    assert ids(metadata=odd) == [b.id]
    assert ids(metadata={"%": "x"}) == ids(metadata={"_": "_"}) == []
    assert ids(metadata={}) == ids() == [d.id, c.id, b.id, a.id]
    assert ids(without_metadata=True) == [d.id, c.id]


# ---- isolation


@pytest.mark.parametrize(
    "operation",
    [
        lambda b, i: b.get("acme", i),
        lambda b, i: b.cancel("acme", i),
        lambda b, i: b.pause("acme", i),
        lambda b, i: b.resume("acme", i),
        lambda b, i: b.events("acme", i),
        lambda b, i: b.checkpoints("acme", i),
    ],
    ids=["get", "cancel", "pause", "resume", "events", "checkpoints"],
)
def test_another_tenants_job_is_a_missing_one(
    bench: Bench, operation: Callable[..., object]
) -> None:
    theirs = bench.submit("zeta")
    answers = set()
    for job_id in (theirs.id, "ftjob-" + "0" * 24, "ftjob-x", "", "../x", "\ud800", "\0"):
        with pytest.raises(JobNotFound) as caught:
            operation(bench.backlog, job_id)
        assert caught.value.given == job_id
        if len(job_id) == len(theirs.id):
            answers.add(str(caught.value).replace(job_id, "ID"))
    assert len(answers) == 1
    assert bench.backlog.get("zeta", theirs.id) == theirs


def test_another_jobs_cursor_is_none(bench: Bench) -> None:
    mine, theirs = bench.submit(), bench.submit("zeta")
    event = bench.backlog.events("zeta", theirs.id).items[0].id
    for cursor in (event, theirs.id, "ftevent-" + "0" * 32, "x", "", "\ud800"):
        with pytest.raises(UnknownCursor):
            bench.backlog.events("acme", mine.id, after=cursor)
        with pytest.raises(UnknownCursor):
            bench.backlog.list("acme", after=cursor)
        with pytest.raises(UnknownCursor):
            bench.backlog.checkpoints("acme", mine.id, after=cursor)
    late = bench.backlog.events("acme", mine.id).items[0].id[:-8] + "0000ffff"
    with pytest.raises(UnknownCursor):
        bench.backlog.events("acme", mine.id, after=late)


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


# ---- the ends


def test_a_success_comes_with_its_version(bench: Bench) -> None:
    claim = bench.running(suffix="sql")
    bench.backlog.heartbeat(claim, LEASE, Progress(9, 10, remaining_s=5))
    bench.clock.advance(5)
    bench.store.catalog.upload(
        "acme", "sql", [make_file(1)], also=bench.backlog.finishing(claim, trained_tokens=1234)
    )
    job = bench.get(claim)
    assert (job.status, job.finished_at) == ("succeeded", bench.clock.now)
    assert (job.fine_tuned_model, job.version, job.digest) == ("sql", "sql:1", make_digest(1))
    assert (job.trained_tokens, job.step, job.estimated_finish) == (1234, 10, None)
    assert bench.messages(job)[-1] == "The job succeeded: sql:1."


def test_a_success_may_repeat_a_version(bench: Bench) -> None:
    push(bench.store.catalog, "sql", 1)
    claim = bench.running(suffix="sql")
    bench.finish(claim, seed=1)
    assert (bench.get(claim).status, bench.get(claim).version) == ("succeeded", "sql:1")


def test_only_what_the_job_makes_ends_it(bench: Bench) -> None:
    claim = bench.running(suffix="sql")
    also = bench.backlog.finishing(claim)
    with pytest.raises(RuntimeError, match="not what the job"):
        push(bench.store.catalog, "math", 1, also=also)
    with pytest.raises(RuntimeError, match="not what the job"):
        push(bench.store.catalog, "sql", 1, tag="step-4", also=also)
    with pytest.raises(RuntimeError, match="no checkpoint"):
        push(bench.store.catalog, "sql", 1, also=bench.backlog.checkpointing(claim, 4, {}))
    assert bench.store.catalog.list("acme") == []
    assert bench.get(claim).status == "running"


def test_a_failure_says_why(bench: Bench) -> None:
    claim = bench.running()
    error = JobError("invalid_training_file", "line 3: no `messages`", "training_file")
    bench.backlog.fail(claim, error)
    job = bench.get(claim)
    assert (job.status, job.error, job.finished_at) == ("failed", error, bench.clock.now)
    event = bench.backlog.events("acme", job.id).items[0]
    assert (event.level, event.message) == ("error", "The job failed: line 3: no `messages`")
    assert bench.backlog.claim("w", LEASE) is None


# ---- cancel, pause, resume


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


# ---- checkpoints and result files


def checkpoint(bench: Bench, claim: object, step: int, seed: int, **metrics: float) -> None:
    also = bench.backlog.checkpointing(claim, step, metrics)  # type: ignore[arg-type]
    push(bench.store.catalog, "sql", seed, tag=f"step-{step}", also=also)


def test_checkpoints_are_listed_by_their_steps(bench: Bench) -> None:
    claim = bench.running(suffix="sql")
    for step, seed in ((100, 1), (20, 2), (60, 3)):
        checkpoint(bench, claim, step, seed, train_loss=1.0 / step, full_valid_loss=float("inf"))
    page = bench.backlog.checkpoints("acme", claim.job.id, limit=2)
    assert ([c.step for c in page.items], page.has_more) == ([100, 60], True)
    rest = bench.backlog.checkpoints("acme", claim.job.id, after=page.items[-1].id)
    assert ([c.step for c in rest.items], rest.has_more) == ([20], False)
    oldest = bench.backlog.checkpoints("acme", claim.job.id, order="asc", limit=1).items[0]
    assert oldest == rest.items[0]
    assert oldest.id.startswith("ftckpt-")
    assert (oldest.model, oldest.digest) == ("sql@step-20", make_digest(2))
    assert oldest.metrics == {"train_loss": 0.05, "full_valid_loss": None}
    with bench.store.catalog.resolve("acme", [oldest.model]) as resolution:
        assert resolution.versions[0].digest == oldest.digest
    assert "A checkpoint can be tried: sql@step-20." in bench.messages(claim)


def test_a_checkpoint_written_again_is_the_same_one(bench: Bench) -> None:
    claim = bench.running(suffix="sql")
    checkpoint(bench, claim, 20, 1)
    before = bench.backlog.checkpoints("acme", claim.job.id).items[0]
    bench.clock.advance(LEASE)
    checkpoint(bench, bench.claim("w2"), 20, 2)
    (after,) = bench.backlog.checkpoints("acme", claim.job.id).items
    assert (after.id, after.digest) == (before.id, make_digest(2))
    assert sum("can be tried" in m for m in bench.messages(claim)) == 1


def test_a_result_file_is_its_jobs_and_replaces_that_of_an_attempt_before(bench: Bench) -> None:
    files = bench.store.files

    def attach(claim: object, name: str, data: bytes) -> str:
        also = bench.backlog.attaching(claim)  # type: ignore[arg-type]
        return push_file(files, name, data, purpose="fine-tune-results", also=also).id

    claim = bench.running()
    first = attach(claim, "metrics.csv", b"1")
    bench.clock.advance(LEASE)
    again = bench.claim("w2")
    other, second = attach(again, "log.txt", b"2"), attach(again, "metrics.csv", b"3")
    assert bench.get(claim).result_files == (other, second)
    with pytest.raises(FileNotFound):
        files.get("acme", first)
    assert files.get("acme", second).filename == "metrics.csv"


# ---- files that jobs need


def test_a_file_deleted_after_the_submission_is_there_for_the_worker(
    bench: Bench, tmp_path: Path
) -> None:
    claim = bench.running()
    file_id = bench.files["acme"]
    bench.store.files.delete("acme", file_id)
    bench.store.files.delete("zeta", bench.files["zeta"])  # it had the same bytes
    bench.store.catalog.recover()
    with bench.store.files.content("acme", file_id, job=claim.job.id) as path:
        assert path.read_bytes()
    bench.finish(claim)
    assert bench.store.catalog.recover().blobs == 1
    with pytest.raises(FileNotFound):
        bench.store.files.content("acme", file_id, job=claim.job.id).__enter__()


def test_a_finished_jobs_versions_outlive_it_as_any_other(bench: Bench) -> None:
    claim = bench.running(suffix="sql")
    bench.finish(claim)
    bench.store.catalog.delete("acme", "sql")
    assert bench.get(claim).fine_tuned_model == "sql"
    with pytest.raises(AdapterNotFound):
        bench.store.catalog.resolve("acme", ["sql"])


def test_the_table_holds_no_foreign_key_to_nothing(bench: Bench, tmp_path: Path) -> None:
    claim = bench.running(metadata={"a": "b"})
    checkpoint_claim = bench.running(suffix="sql")
    checkpoint(bench, checkpoint_claim, 1, 1)
    bench.finish(claim)
    assert rows(tmp_path, "PRAGMA foreign_key_check") == []


# ---- data of a release before


def test_a_stored_database_is_read_and_its_jobs_go_on(tmp_path: Path) -> None:
    # The first release with jobs wrote it; its request lacks what later ones may add.
    dump = Path(__file__).parents[1] / "store" / "registries" / "0003.sql"
    connection = sqlite3.connect(tmp_path / "registry.sqlite3")
    connection.executescript(dump.read_text())
    connection.close()
    registry = Registry(f"sqlite:///{tmp_path / 'registry.sqlite3'}")
    registry.migrate()
    backlog = Backlog(registry)
    done, running = backlog.list("acme").items
    assert (done.status, done.version, len(done.result_files)) == ("succeeded", "sql:2", 1)
    assert (running.status, running.wanted, running.loss) == ("running", "pause", 0.5)
    assert running.request.metadata == {"team": "a"}
    assert [j.id for j in backlog.list("acme", metadata={"team": "a"}).items] == [running.id]
    assert [e.step for e in backlog.events("acme", running.id).items] == [3, None]
    assert backlog.checkpoints("acme", running.id).items[0].model == "sql@step-3"
    assert backlog.claim("w", LEASE) is None  # its lease has ended, and a pause was wanted
    assert backlog.resume("acme", running.id).status == "queued"
    claim = backlog.claim("w", LEASE)
    assert claim is not None
    assert (claim.fence, claim.job.attempt) == (3, 3)
    registry.close()
