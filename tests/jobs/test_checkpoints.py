"""How many checkpoints a job keeps, which of them are listed, and what they take of the quota."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from gossamer.jobs.errors import LeaseLost
from gossamer.jobs.views import Claim, JobLimits
from gossamer.store.catalog.errors import AdapterNotFound, QuotaExceeded
from gossamer.store.catalog.views import StoreLimits, Usage
from tests.jobs.support import LEASE, Bench, benched
from tests.store.support import make_digest, make_file, meaning, push, rows, stored_blobs

KEPT = 3


@pytest.fixture
def few(tmp_path: Path) -> Iterator[Bench]:
    """A bench on which a job keeps three checkpoints."""
    with benched(tmp_path, JobLimits(checkpoints=KEPT)) as bench:
        yield bench


def checkpoint(bench: Bench, claim: Claim, step: int, seed: int | None = None) -> None:
    """As a worker makes one; `make_file(step)` unless there is a seed."""
    push(
        bench.store.catalog, claim.job.adapter, step if seed is None else seed, tag=f"step-{step}",
        also=bench.backlog.checkpointing(claim, step, {}),
        outdated=bench.backlog.outdated(claim, step),
    )  # fmt: skip


def listed(bench: Bench, claim: Claim) -> list[int]:
    """The steps of the job's checkpoints, each of which can be asked."""
    found = bench.backlog.checkpoints("acme", claim.job.id, limit=100, order="asc").items
    for one in found:
        assert meaning(bench.store.catalog, one.model) == one.digest
    return [one.step for one in found]


def test_the_last_ones_are_kept_and_nothing_else_of_the_others(few: Bench) -> None:
    claim = few.running(suffix="sql")
    push(few.store.catalog, "sql", 100)
    for step in range(1, 9):
        checkpoint(few, claim, step)
        assert listed(few, claim) == list(range(max(1, step - KEPT + 1), step + 1))
    with pytest.raises(AdapterNotFound):
        meaning(few.store.catalog, "sql@step-5")
    versions = few.store.catalog.show("acme", "sql").versions
    assert [v.label for v in versions] == ["sql:1", "sql@step-6", "sql@step-7", "sql@step-8"]
    assert len(rows(few.data, "SELECT id FROM versions")) == 1 + KEPT
    assert stored_blobs(few.data) == {v.blob_id for v in versions} | {
        file.blob_id for tenant in few.files for file in few.store.files.list(tenant).items
    }


def test_of_a_job_that_has_failed_no_more_are_left(few: Bench) -> None:
    claim = few.running(suffix="sql")
    for step in range(1, 6):
        checkpoint(few, claim, step)
    few.backlog.cancel("acme", claim.job.id)
    few.backlog.cancelled(claim)
    assert listed(few, claim) == [3, 4, 5]


def test_those_of_another_job_of_the_name_are_its_own(few: Bench) -> None:
    first = few.running(suffix="sql")
    for step in (1, 2, 3):
        checkpoint(few, first, step)
    second = few.running(suffix="sql")
    for step in (3, 10, 20, 30, 40):
        checkpoint(few, second, step, seed=50 + step)
    assert listed(few, second) == [20, 30, 40]
    # Its third was put in the place of the first job's: that one is no more.
    assert listed(few, first) == [1, 2]


def test_an_attempt_that_repeats_old_steps_drops_no_newer_ones(few: Bench) -> None:
    claim = few.running(suffix="sql")
    for step in range(1, 7):
        checkpoint(few, claim, step)
    few.clock.advance(LEASE)
    again = few.claim("w2")
    for step in (2, 3, 4, 5, 6):
        checkpoint(few, again, step)
        assert {5, 6} <= set(listed(few, again))
    assert listed(few, again) == [4, 5, 6]


def test_what_an_unfinished_job_begins_with_stays(few: Bench) -> None:
    claim = few.running(suffix="sql")
    checkpoint(few, claim, 1)
    begun_with = {"sql@step-1": f"sql@{make_digest(1)}"}
    other = few.submit(parameters={"init_from": "sql@step-1"}, references=begun_with)
    for step in range(2, 7):
        checkpoint(few, claim, step)
    assert listed(few, claim) == [1, 4, 5, 6]
    few.backlog.cancel("acme", other.id)
    checkpoint(few, claim, 7)
    assert listed(few, claim) == [5, 6, 7]


def test_who_has_lost_the_job_removes_nothing(few: Bench) -> None:
    claim = few.running(suffix="sql")
    for step in (1, 2, 3):
        checkpoint(few, claim, step)
    few.clock.advance(LEASE)
    few.claim("w2")
    with pytest.raises(LeaseLost):
        checkpoint(few, claim, 4)
    assert listed(few, claim) == [1, 2, 3]


def test_one_that_a_request_uses_answers_until_its_end(few: Bench) -> None:
    claim, catalog = few.running(suffix="sql"), few.store.catalog
    checkpoint(few, claim, 1)
    with catalog.resolve("acme", ["sql@step-1"]) as resolution:
        (version,) = resolution.versions
        for step in range(2, 6):
            checkpoint(few, claim, step)
        assert catalog.open(version.digest).nnz
        assert version.blob_id in stored_blobs(few.data)
    catalog.close()
    assert version.blob_id not in stored_blobs(few.data)


def test_a_registration_that_fails_removes_nothing(few: Bench) -> None:
    claim = few.running(suffix="sql")
    for step in (1, 2, 3):
        checkpoint(few, claim, step)

    def fail(*_: object) -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        push(
            few.store.catalog, "sql", 4, tag="step-4", also=fail,
            outdated=few.backlog.outdated(claim, 4),
        )  # fmt: skip
    assert listed(few, claim) == [1, 2, 3]


def test_the_list_passes_over_what_is_deleted(bench: Bench) -> None:
    claim = bench.running(suffix="sql")
    for step in range(1, 8):
        checkpoint(bench, claim, step)
    assert listed(bench, claim) == [3, 4, 5, 6, 7], "five are kept where nothing else is said"
    page = bench.backlog.checkpoints("acme", claim.job.id, limit=2)
    assert ([c.step for c in page.items], page.has_more) == ([7, 6], True)
    for step in (6, 5, 3):  # the last of that page, too, and the last of all
        bench.store.catalog.delete("acme", "sql", f"step-{step}")
    rest = bench.backlog.checkpoints("acme", claim.job.id, limit=1, after=page.items[-1].id)
    assert ([c.step for c in rest.items], rest.has_more) == ([4], False)
    up = bench.backlog.checkpoints("acme", claim.job.id, after=rest.items[0].id, order="asc")
    assert ([c.step for c in up.items], up.has_more) == ([7], False)
    bench.store.catalog.delete("acme", "sql")
    assert listed(bench, claim) == []
    checkpoint(bench, claim, 6)
    assert listed(bench, claim) == [6], "made again it is there again"


# ---- the quota


def test_they_take_bytes_and_are_no_adapters(bench: Bench) -> None:
    claim, sizes = bench.running(suffix="sql"), [len(make_file(seed)) for seed in range(4)]
    for step in (1, 2):
        checkpoint(bench, claim, step)
    usage = bench.store.catalog.usage("acme")
    assert usage == Usage(0, sizes[1] + sizes[2])
    result = push(bench.store.catalog, "sql", 2)  # the same file as the second
    assert (result.label, result.current) == ("sql:1", True), "a version, not that checkpoint"
    assert bench.store.catalog.usage("acme") == Usage(1, sizes[1] + sizes[2])
    checkpoint(bench, claim, 2, seed=3)  # in the place of another
    assert bench.store.catalog.usage("acme") == Usage(1, sizes[1] + sizes[2] + sizes[3])


def test_one_beside_which_the_result_has_no_room_is_refused(tmp_path: Path) -> None:
    sizes = [len(make_file(seed)) for seed in range(10)]
    limit = 3 * max(sizes)
    with benched(tmp_path, limits_of_store=StoreLimits(stored_bytes=limit)) as bench:
        claim, catalog = bench.running(suffix="sql"), bench.store.catalog
        for step in (1, 2):
            checkpoint(bench, claim, step)
        before = stored_blobs(bench.data)
        with pytest.raises(QuotaExceeded) as caught:
            checkpoint(bench, claim, 3)
        assert (caught.value.what, caught.value.limit) == ("bytes", limit)
        assert listed(bench, claim) == [1, 2]
        assert stored_blobs(bench.data) == before
        bench.finish(claim, seed=3)
        assert bench.get(claim).status == "succeeded"
        assert catalog.usage("acme").stored_bytes == sum(sizes[1:4])


def test_one_that_takes_anothers_place_needs_no_more_room(tmp_path: Path) -> None:
    size = max(len(make_file(seed)) for seed in range(10))
    limits = StoreLimits(stored_bytes=3 * size)
    with benched(tmp_path, JobLimits(checkpoints=2), limits_of_store=limits) as bench:
        claim = bench.running(suffix="sql")
        for step in range(1, 8):
            checkpoint(bench, claim, step)
        assert listed(bench, claim) == [6, 7]


def test_a_result_that_has_no_room_leaves_nothing_half_written(tmp_path: Path) -> None:
    size = max(len(make_file(seed)) for seed in range(10))
    with benched(tmp_path, limits_of_store=StoreLimits(stored_bytes=2 * size)) as bench:
        claim, catalog = bench.running(suffix="sql"), bench.store.catalog
        checkpoint(bench, claim, 1)
        push(catalog, "other", 2)
        before, used = stored_blobs(bench.data), catalog.usage("acme")
        with pytest.raises(QuotaExceeded, match="delete an adapter or a version"):
            bench.finish(claim, seed=3)
        assert bench.get(claim).status == "running", "the worker says why it fails"
        assert (stored_blobs(bench.data), catalog.usage("acme")) == (before, used)
        assert rows(bench.data, "SELECT * FROM uploads") == []
        assert catalog.show("acme", "sql").current is None
