"""Many threads and processes at one queue, and workers that die or sleep."""

from __future__ import annotations

import signal
import subprocess
import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from gossamer.jobs.backlog import Backlog
from gossamer.jobs.errors import JobsError, TooManyJobs
from gossamer.jobs.views import Claim, JobLimits
from gossamer.store.clock import utc_now
from gossamer.store.registry.database import Registry
from tests.jobs.support import LEASE, Bench, benched, count_rows
from tests.store.support import race, start_child


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[Bench]:
    with benched(tmp_path, JobLimits(unfinished=100), busy_timeout_s=60) as bench:
        yield bench


def at_once(threads: int, act: object) -> list[object]:
    """Call `act(i)` in so many threads at one moment; what each returned or raised."""
    barrier = threading.Barrier(threads)

    def one(i: int) -> object:
        barrier.wait()
        try:
            return act(i)  # type: ignore[operator]
        except JobsError as error:
            return error

    with ThreadPoolExecutor(threads) as pool:
        return list(pool.map(one, range(threads)))


def test_twenty_workers_claim_fifty_jobs_each_exactly_once(bench: Bench) -> None:
    jobs = [bench.submit(tenant).id for tenant in ("acme", "zeta") for _ in range(25)]

    def work(i: int) -> list[str]:
        mine = []
        while claim := bench.backlog.claim(f"w{i}", LEASE):
            mine.append(claim.job.id)
        return mine

    claimed = [job for mine in at_once(20, work) for job in mine]  # type: ignore[attr-defined]
    assert Counter(claimed) == Counter(jobs)
    assert {j.attempt for j in bench.backlog.list("acme", limit=99).items} == {1}


def test_a_retry_storm_makes_one_job(bench: Bench) -> None:
    request = bench.request(suffix="sql", metadata={"a": "b"})
    answers = at_once(20, lambda _: bench.backlog.submit("acme", request))
    assert len({repr(a) for a in answers}) == 1
    assert count_rows(bench.store.registry, "jobs") == 1
    assert count_rows(bench.store.registry, "job_events") == 1


def test_twenty_submissions_at_once_never_pass_the_quota(tmp_path: Path) -> None:
    with benched(tmp_path, JobLimits(unfinished=7), busy_timeout_s=60) as bench:
        answers = at_once(20, lambda i: bench.submit(seed=i))
        assert sum(isinstance(a, TooManyJobs) for a in answers) == 13
        assert count_rows(bench.store.registry, "jobs") == 7


def test_a_cancel_races_with_a_claim_and_one_of_them_is_first(bench: Bench) -> None:
    for _ in range(10):
        job = bench.submit()

        def act(i: int, job_id: str = job.id) -> object:
            return bench.backlog.claim("w", LEASE) if i else bench.backlog.cancel("acme", job_id)

        claim = at_once(2, act)[1]
        found = bench.get(job)
        if claim is None:
            assert found.status == "cancelled"
        else:
            assert isinstance(claim, Claim)
            assert (found.status, found.wanted) == ("running", "cancel")
            bench.backlog.cancelled(claim)


CLAIM = """
import sys
from gossamer.jobs.backlog import Backlog
from gossamer.store.registry.database import Registry
registry = Registry(sys.argv[1], busy_timeout_s=60)
backlog = Backlog(registry)
print("ready", flush=True)
input()
while claim := backlog.claim("w", 60):
    print(claim.job.id)
registry.close()
"""


def url(data: Path) -> str:
    return f"sqlite:///{data / 'registry.sqlite3'}"


def test_workers_of_several_processes_claim_each_job_once(bench: Bench, tmp_path: Path) -> None:
    jobs = [bench.submit().id for _ in range(12)]
    printed = race(CLAIM, url(tmp_path), processes=3)
    assert Counter("".join(printed).split()) == Counter(jobs)


# The worker of the next tests. It tells its fence, then obeys: `finish` tries to end the job.
WORK = """
import sys
from pathlib import Path
from gossamer.jobs.backlog import Backlog
from gossamer.jobs.errors import LeaseLost
from gossamer.jobs.lease import Lease
from gossamer.store.catalog.opening import Store
from tests.store.support import BASE, make_file
with Store(Path(sys.argv[1]), BASE, busy_timeout_s=60) as store:
    backlog = Backlog(store.registry)
    lease = Lease.take(backlog, "doomed", float(sys.argv[2]))
    print(lease.claim.fence, flush=True)
    input()
    print(lease.remaining_s)
    for act in (
        lease.beat,
        lambda: backlog.event(lease.claim, "info", "still here"),
        lambda: store.catalog.upload(
            "acme", "sql", [make_file(1)], also=backlog.finishing(lease.claim)
        ),
    ):
        try:
            act()
        except LeaseLost as error:
            print(type(error).__name__)
"""


def wait_for_claim(backlog: Backlog, seconds: float) -> tuple[Claim, float]:
    """Poll as a worker does, but faster; the claim, and how long it took."""
    start = time.monotonic()
    while time.monotonic() < start + seconds:
        if claim := backlog.claim("heir", LEASE):
            return claim, time.monotonic() - start
        time.sleep(0.02)
    raise TimeoutError("nobody gave the job up")


def started(data: Path, lease: float) -> tuple[subprocess.Popen[str], int]:
    child = start_child(WORK, data, str(lease))
    if child.stdout is None:
        raise RuntimeError("no pipe")
    return child, int(child.stdout.readline())


@pytest.fixture
def live(bench: Bench, tmp_path: Path) -> Iterator[Backlog]:
    """The same queue by the real clock."""
    registry = Registry(url(tmp_path), busy_timeout_s=60)
    yield Backlog(registry, clock=utc_now)
    registry.close()


def test_the_job_of_a_killed_worker_goes_to_another_when_its_lease_ends(
    bench: Bench, live: Backlog, tmp_path: Path
) -> None:
    job = bench.submit()
    child, fence = started(tmp_path, 1.0)
    child.kill()
    child.communicate()
    claim, waited = wait_for_claim(live, 20)
    assert 0.3 < waited < 10
    assert (claim.job.id, claim.job.attempt) == (job.id, 2)
    assert claim.fence > fence


def test_a_worker_that_slept_past_its_lease_is_fenced(
    bench: Bench, live: Backlog, tmp_path: Path
) -> None:
    job = bench.submit(suffix="sql")
    child, fence = started(tmp_path, 0.5)
    child.send_signal(signal.SIGSTOP)
    claim, _ = wait_for_claim(live, 20)
    assert claim.fence > fence
    child.send_signal(signal.SIGCONT)
    output, errors = child.communicate("finish\n", timeout=60)
    assert errors == ""
    assert output.splitlines() == ["0.0", "LeaseLost", "LeaseLost", "LeaseLost"]
    assert bench.store.catalog.list("acme") == []
    assert "still here" not in bench.messages(job)
    bench.finish(claim)
    assert live.get("acme", job.id).version == "sql:1"


def test_a_worker_that_slept_and_was_not_missed_goes_on(bench: Bench, tmp_path: Path) -> None:
    job = bench.submit(suffix="sql")
    child, _ = started(tmp_path, 0.2)
    time.sleep(0.5)
    output, errors = child.communicate("finish\n", timeout=60)
    assert errors == ""
    assert output.splitlines() == ["0.0"]
    assert bench.get(job).status == "succeeded"
