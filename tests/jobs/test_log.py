"""A job's events: in order, written once, bounded."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from gossamer.jobs.views import Claim, Event, JobLimits
from tests.jobs.support import LEASE, Bench, benched, count_rows

KEEP = 40


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[Bench]:
    with benched(tmp_path, JobLimits(events=KEEP)) as bench:
        yield bench


def events(bench: Bench, claim: Claim, **options: object) -> tuple[Event, ...]:
    given = {"limit": 1000, "order": "asc", **options}
    return bench.backlog.events("acme", claim.job.id, **given).items  # type: ignore[arg-type]


def metrics(bench: Bench, claim: Claim, step: int, **data: object) -> bool:
    return bench.backlog.event(claim, "info", f"step {step}", {"step": step, **data})


def steps(bench: Bench, claim: Claim) -> list[int | None]:
    return [e.step for e in events(bench, claim) if e.kind == "metrics"]


def test_events_are_numbered_and_come_in_pages_either_way(bench: Bench) -> None:
    claim = bench.running()
    for i in range(5):
        bench.clock.advance(1)
        assert bench.backlog.event(claim, "warn", f"line {i}")
    found = events(bench, claim)
    assert [e.message for e in found][-5:] == [f"line {i}" for i in range(5)]
    assert len({e.id for e in found}) == len(found)
    assert (found[-1].level, found[-1].kind, found[-1].data) == ("warn", "message", None)
    assert found[-1].created_at == bench.clock.now
    page = bench.backlog.events("acme", claim.job.id, limit=3)
    assert (list(page.items), page.has_more) == (list(found[:-4:-1]), True)
    rest = bench.backlog.events("acme", claim.job.id, after=page.items[-1].id)
    assert (list(rest.items), rest.has_more) == (list(found[-4::-1]), False)
    assert events(bench, claim, after=found[3].id) == found[4:]
    assert events(bench, claim, after=found[-1].id) == ()


def test_metrics_say_of_which_step_they_are(bench: Bench) -> None:
    claim = bench.running()
    assert metrics(bench, claim, 7, train_loss=0.5, valid_loss=float("nan"), rate=float("inf"))
    event = events(bench, claim)[-1]
    assert (event.kind, event.step) == ("metrics", 7)
    assert event.data == {"step": 7, "train_loss": 0.5, "valid_loss": None, "rate": None}


def test_the_metrics_of_a_step_are_written_once(bench: Bench) -> None:
    claim = bench.running()
    for step in range(1, 11):
        assert metrics(bench, claim, step, attempt=1)
    bench.clock.advance(LEASE)
    again = bench.claim("w2")
    for step in range(6, 16):  # from the checkpoint at 5
        assert metrics(bench, again, step, attempt=2) == (step > 10)
    assert steps(bench, claim) == list(range(1, 16))
    assert [e.data["attempt"] for e in events(bench, claim) if e.data] == [1] * 10 + [2] * 5


def test_a_key_makes_any_event_the_same_one(bench: Bench) -> None:
    claim = bench.running()
    assert bench.backlog.event(claim, "info", "read 10 examples", key="examples")
    assert not bench.backlog.event(claim, "info", "read 10 examples", key="examples")
    assert metrics(bench, claim, 5, train_loss=1.0)
    assert bench.backlog.event(claim, "info", "eval", {"step": 5, "valid_loss": 2.0}, key="eval-5")
    assert not bench.backlog.event(claim, "info", "e", {"step": 5, "valid_loss": 2}, key="eval-5")
    assert bench.backlog.event(claim, "info", "twice")
    assert bench.backlog.event(claim, "info", "twice")
    assert steps(bench, claim) == [5, 5]
    other = bench.running()
    assert bench.backlog.event(other, "info", "read 9 examples", key="examples")


def test_a_log_is_bounded_and_the_curve_stays_whole(bench: Bench) -> None:
    claim = bench.running()
    for step in range(1, 201):
        assert metrics(bench, claim, step)
        assert count_rows(bench.store.registry, "job_events") <= KEEP
    found = steps(bench, claim)
    assert found[0] == 1
    assert found[-5:] == [196, 197, 198, 199, 200]
    assert found == sorted(set(found))  # type: ignore[type-var]
    assert len(found) > KEEP // 2
    assert bench.messages(claim)[:2] == [
        "The job is queued, with the method sparta.",
        "A worker begins.",
    ]


def test_thinned_metrics_do_not_come_back(bench: Bench) -> None:
    claim = bench.running()
    for step in range(1, 101):
        metrics(bench, claim, step)
    bench.clock.advance(LEASE)
    again = bench.claim("w2")
    written = [step for step in range(1, 103) if metrics(bench, again, step)]
    assert written == [101, 102]
    assert bench.messages(claim)[-3:] == ["A worker begins, attempt 2.", "step 101", "step 102"]
    assert steps(bench, claim) == sorted(set(steps(bench, claim)))  # type: ignore[type-var]


def test_a_cursor_that_was_thinned_is_still_one(bench: Bench) -> None:
    claim = bench.running()
    ids = []
    for step in range(1, 101):
        metrics(bench, claim, step)
        ids.append(events(bench, claim)[-1].id)
    gone = [i for i in ids if i not in {e.id for e in events(bench, claim)}]
    assert gone
    for cursor in gone:
        later = events(bench, claim, after=cursor)
        assert [e.id for e in later] == sorted(e.id for e in later)
        assert all(e.id > cursor for e in later)


def test_a_log_of_messages_alone_is_bounded_too(bench: Bench) -> None:
    claim = bench.running()
    for i in range(100):
        bench.backlog.event(claim, "info", f"line {i}")
        assert count_rows(bench.store.registry, "job_events") <= KEEP
    assert bench.messages(claim)[-1] == "line 99"


def test_one_jobs_log_takes_nothing_from_anothers(bench: Bench) -> None:
    one, two = bench.running(), bench.running()
    for step in range(30):
        metrics(bench, one, step)
        metrics(bench, two, step)
    assert steps(bench, one) == steps(bench, two) == list(range(30))


def test_a_message_is_cut_and_storable(bench: Bench) -> None:
    claim = bench.running()
    bench.backlog.event(claim, "info", "a\0b" + "x" * 5000)
    message = bench.messages(claim)[-1]
    assert message.startswith("a\ufffdb")
    assert len(message) == 2000
