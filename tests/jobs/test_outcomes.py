"""What becomes of a job: its end, its version, its checkpoints, and the files that it needs."""

from __future__ import annotations

from pathlib import Path

import pytest

from gossamer.jobs.views import Claim, JobError, Progress
from gossamer.store.catalog.errors import AdapterNotFound, FileNotFound
from tests.jobs.support import LEASE, Bench
from tests.store.support import make_digest, make_file, push, push_file, rows

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


# ---- checkpoints and result files


def checkpoint(bench: Bench, claim: Claim, step: int, seed: int, **metrics: float) -> None:
    also = bench.backlog.checkpointing(claim, step, metrics)
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

    def attach(claim: Claim, name: str, data: bytes) -> str:
        also = bench.backlog.attaching(claim)
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
