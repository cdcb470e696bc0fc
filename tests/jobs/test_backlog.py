"""The backlog's door for tenants: submit, list, and nothing of anybody else's."""

from __future__ import annotations

import sqlite3
from collections.abc import Callable
from pathlib import Path

import pytest

from gossamer.jobs.backlog import Backlog
from gossamer.jobs.errors import JobNotFound, TooManyJobs, UnknownCursor, UnusableFile
from gossamer.jobs.views import JobError, JobLimits
from gossamer.store.catalog.errors import TenantNotFound
from gossamer.store.registry.database import Registry
from tests.jobs.support import LEASE, Bench, benched, count_rows
from tests.store.support import make_digest, push_file

# ---- submit


def test_a_job_is_queued_as_it_was_asked_for(bench: Bench) -> None:
    job = bench.backlog.submit(
        "acme",
        bench.request(
            method="lota",
            parameters={
                "sparsity": 0.99,
                "iterations": 2,
                "init_from": "sql*0.5",
                "init_positions": "select",
            },
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
    assert backlog.checkpoints("acme", running.id).items == (), "this registry has no such version"
    assert backlog.claim("w", LEASE) is None  # its lease has ended, and a pause was wanted
    assert backlog.resume("acme", running.id).status == "queued"
    claim = backlog.claim("w", LEASE)
    assert claim is not None
    assert (claim.fence, claim.job.attempt) == (3, 3)
    registry.close()
