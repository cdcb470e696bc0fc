"""A worker's side of a claim."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from gossamer.jobs.errors import LeaseLost
from gossamer.jobs.lease import Lease
from gossamer.jobs.views import Progress
from gossamer.store.catalog.errors import RegistryBusy
from gossamer.store.registry.database import Registry
from tests.jobs.support import LEASE, Bench, benched


class Ticks:
    """A monotonic clock that moves only when told."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[Bench]:
    with benched(tmp_path, busy_timeout_s=0.1) as bench:
        yield bench


def take(bench: Bench, ticks: Ticks) -> Lease:
    lease = Lease.take(bench.backlog, "w", LEASE, clock=ticks)
    assert lease is not None
    return lease


def test_there_is_none_where_there_is_no_job(bench: Bench) -> None:
    assert Lease.take(bench.backlog, "w", LEASE) is None
    bench.submit()
    assert Lease.take(bench.backlog, "w", LEASE, base_fingerprint="other") is None


def test_a_heartbeat_is_due_after_a_third_of_the_lease(bench: Bench) -> None:
    bench.submit()
    ticks = Ticks()
    lease = take(bench, ticks)
    assert (lease.is_due, lease.remaining_s) == (False, LEASE)
    ticks.now += LEASE / 3
    assert lease.is_due
    assert lease.beat(Progress(1, 2)) == "continue"
    assert (lease.is_due, lease.remaining_s) == (False, LEASE)
    assert bench.get(lease.claim).step == 1
    ticks.now += 2 * LEASE
    assert lease.remaining_s == 0


def test_the_wall_clock_does_not_move_it(bench: Bench) -> None:
    bench.submit()
    lease = take(bench, Ticks())
    bench.clock.advance(86400)
    assert lease.remaining_s == LEASE
    assert lease.beat() == "continue"


def test_time_counts_from_before_the_request(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    bench.submit()
    ticks = Ticks()
    slow = Backlogged(bench, ticks)
    lease = Lease.take(slow, "w", LEASE, clock=ticks)  # type: ignore[arg-type]
    assert lease is not None
    assert lease.remaining_s == LEASE - 4
    ticks.now += 5
    lease.beat()
    assert lease.remaining_s == LEASE - 4


class Backlogged:
    """A backlog whose answers take four seconds."""

    def __init__(self, bench: Bench, ticks: Ticks) -> None:
        self._backlog, self._ticks = bench.backlog, ticks

    def claim(self, *arguments: object, **options: object) -> object:
        self._ticks.now += 4
        return self._backlog.claim(*arguments, **options)  # type: ignore[arg-type]

    def heartbeat(self, *arguments: object) -> object:
        self._ticks.now += 4
        return self._backlog.heartbeat(*arguments)  # type: ignore[arg-type]


def test_a_heartbeat_that_was_not_sent_extends_nothing(bench: Bench, tmp_path: Path) -> None:
    bench.submit()
    ticks = Ticks()
    lease = take(bench, ticks)
    ticks.now += 20
    other = Registry(f"sqlite:///{tmp_path / 'registry.sqlite3'}")
    with other.write() as session:
        session.connection()  # begins
        with pytest.raises(RegistryBusy):
            lease.beat()
    other.close()
    assert lease.remaining_s == LEASE - 20
    lease.beat()
    assert lease.remaining_s == LEASE


def test_it_hears_what_is_wanted_and_that_it_is_lost(bench: Bench) -> None:
    job = bench.submit()
    lease = take(bench, Ticks())
    bench.backlog.pause("acme", job.id)
    assert lease.beat() == "pause"
    bench.clock.advance(LEASE)
    assert bench.backlog.claim("w2", LEASE) is None  # the dead worker's job is paused
    with pytest.raises(LeaseLost):
        lease.beat()
