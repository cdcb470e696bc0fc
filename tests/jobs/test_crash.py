"""kill -9 of a worker at every failpoint of what it uploads: a job and its versions always agree,
nothing half-written is visible, and the next worker ends what this one began."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from gossamer.store.failpoints import Failpoint
from tests.jobs.crash_child import CHECKPOINT_SEED, RESULT, RESULT_SEED, STEP, UNCLAIMED, work
from tests.jobs.support import Bench, benched
from tests.store.support import IMPATIENT, check_nothing_is_left_over, make_digest
from tests.store.victims import KILLED, Victim

#: in seconds: longer than a test takes
LEASE = 60
#: A worker passes the points of an adapter's upload twice, of a file's once, and those that both
#: have three times.
ADAPTER = [p for p in Failpoint if p.startswith("upload.")]
FILE = [p for p in Failpoint if p.startswith("file.") and "tomb" not in p]
BOTH = {"upload.spooled", "upload.synced", "upload.renamed", "upload.stored", "upload.spooling"}
DEATHS = [
    *((point, nth) for point in ADAPTER for nth in (1, 2, 3) if nth < 3 or point in BOTH),
    *((point, 1) for point in FILE),
]
#: where a job's rows and what is uploaded could come apart; the store's own tests die everywhere
CRITICAL = ("staged", "stored", "registering", "registered")


@pytest.fixture(scope="module")
def victim() -> Iterator[Victim]:
    with Victim(work) as victim:
        yield victim


def check(bench: Bench) -> None:
    """What is visible of the one job agrees with what the job says."""
    (job,) = bench.backlog.list("acme").items
    listed = bench.store.catalog.list("acme")
    versions = {v.label: v.digest for adapter in listed for v in adapter.versions}
    checkpoints = bench.backlog.checkpoints("acme", job.id).items
    told = {c.model: c.digest for c in checkpoints}
    if job.status == "succeeded":
        assert job.version is not None
        assert job.digest is not None
        told[job.version] = job.digest
    else:
        assert job.status in ("queued", "running")
        assert job.version is None
    assert versions == told
    assert versions.items() <= {
        ("sql:1", make_digest(RESULT_SEED)),
        (f"sql@step-{STEP}", make_digest(CHECKPOINT_SEED)),
    }
    files = bench.store.files.list("acme", purpose="fine-tune-results").items
    assert [f.id for f in files] == list(job.result_files)
    for file in files:
        with bench.store.files.content("acme", file.id) as path:
            assert path.read_bytes() == RESULT


@pytest.mark.parametrize(
    ("point", "nth"),
    [
        pytest.param(
            point,
            nth,
            id=f"{point}-{nth}",
            marks=() if point.endswith(CRITICAL) else pytest.mark.gate,
        )
        for point, nth in DEATHS
    ],
)
def test_a_worker_killed_anywhere(
    tmp_path: Path, victim: Victim, point: Failpoint, nth: int
) -> None:
    with benched(tmp_path) as bench:
        bench.submit(suffix="sql")
    assert victim.run(tmp_path, point, nth) == KILLED
    with benched(tmp_path) as bench:
        check(bench)
        done = bench.backlog.list("acme").items[0].status == "succeeded"
        assert done == ((point, nth) == (Failpoint.UPLOAD_REGISTERED, 2))
    never = Failpoint.DELETE_CLAIMED
    assert victim.run(tmp_path, never, 1, LEASE) == (UNCLAIMED << 8 if done else 0)
    with benched(tmp_path, limits_of_store=IMPATIENT) as bench:
        check(bench)
        (job,) = bench.backlog.list("acme").items
        assert (job.status, job.attempt) == ("succeeded", 1 if done else 2)
        check_nothing_is_left_over(tmp_path)


def test_the_check_notices_a_version_that_no_job_tells_of(tmp_path: Path, victim: Victim) -> None:
    with benched(tmp_path) as bench:
        bench.submit(suffix="sql")
    assert victim.run(tmp_path, Failpoint.DELETE_CLAIMED, 1, LEASE) == 0
    with benched(tmp_path) as bench:
        check(bench)
        with bench.store.registry.write() as session:
            session.connection().exec_driver_sql("UPDATE jobs SET status = 'running'")
        with pytest.raises(AssertionError):
            check(bench)
