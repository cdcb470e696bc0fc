"""Whom a fused window holds back, and for how long. No tensors."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gossamer.engine.fusion import FusionPolicy
from gossamer.engine.sequence import Phase, Sequence
from gossamer.merge import BASE, Mix
from tests.engine.windows import A, B, C, Play, one_among_many, within_bounds


def runs(sequence: Sequence) -> bool:
    return sequence.phase is Phase.RUNNING


def longest(flags: Iterable[bool]) -> int:
    best = now = 0
    for flag in flags:
        now = now + 1 if flag else 0
        best = max(best, now)
    return best


arrivals = st.lists(
    st.tuples(
        st.integers(0, 12),  # steps until it arrives
        st.sampled_from([A, A, A, B, C, BASE]),
        st.integers(1, 12),
        st.integers(1, 40),
    ),
    min_size=2,
    max_size=14,
)


@settings(max_examples=150, deadline=None)
@given(
    arrivals,
    st.sampled_from([0.2, 0.5, 0.75]),
    st.integers(1, 12),
    st.sampled_from([0.0, 0.25, 0.5, 0.8]),
    st.integers(2, 8),
    st.integers(14, 60) | st.just(2000),
)
def test_nobody_is_held_back_for_longer_than_the_settings_say(
    trace: list[tuple[int, Mix, int, int]],
    fuse_share: float,
    most: int,
    share: float,
    rows: int,
    pages: int,
) -> None:
    play = Play(
        pages,
        max_rows=rows,
        fuse_share=fuse_share,
        fuse_hold_steps=most,
        fuse_hold_share=share,
        fuse_min_steps=1,
    ).seen()
    added = []
    for gap, wanted, prompt, max_tokens in trace:
        play.steps(gap)
        added.append(play.add(wanted, max_tokens, prompt))
    for _ in range(3000):
        if all(s.phase is Phase.ENDED for s in added):
            break
        play.step()
    assert [s.output_length for s in added] == [max_tokens for *_, max_tokens in trace]
    assert play.memory.pages.held == 0
    assert not any(play.gate.pins.values())
    for sequence in added:
        assert within_bounds(play.held[sequence], most, share)
        assert longest(play.held[sequence]) <= most
    if rows >= len(trace) and pages == 2000:  # then nothing but a window keeps a row from running
        assert all(play.idle[s] == play.held[s] for s in added)


class Generous(FusionPolicy):
    """Forgets to charge those whom it holds back."""

    def settle(self, *args: Any) -> int:
        return 0


def test_a_policy_without_credit_is_found_out() -> None:
    play, other = one_among_many(Generous)
    play.steps(150)
    assert not within_bounds(play.held[other], 10, 0.5)


def test_a_row_of_another_mix_is_held_for_as_long_as_it_has_credit_and_then_catches_up() -> None:
    play, other = one_among_many()
    play.steps(50)
    assert play.held[other] == ([True] * 10 + [False] * 10) * 2 + [True] * 10
    assert play.idle[other] == play.held[other]
    assert play.windows == 3  # at first all agreed


def test_the_share_of_held_steps_is_what_the_operator_says() -> None:
    play, other = one_among_many(fuse_hold_share=0.2)
    play.steps(50)
    assert play.held[other] == [True] * 10 + [False] * 40
    play, other = one_among_many(fuse_hold_share=0)
    play.steps(100)
    assert sum(play.held[other]) == 10


def test_by_default_nobody_is_held_back() -> None:
    play, other = one_among_many(fuse_share=1.0)
    assert play.windows == 1
    play.steps(39)
    assert play.fused != A
    assert play.held[other] == play.idle[other] == [False] * 39
    assert not other.debt


def test_those_who_wait_count_too_and_are_admitted_in_their_order() -> None:
    play = Play(max_rows=4, fuse_share=0.5, fuse_hold_steps=20).seen()
    for _ in range(3):
        play.add(A, 100)
    play.steps(2)
    first, second, third = play.add(B, 5), play.add(A, 5), play.add(B, 5)
    play.step()
    assert runs(first), "held back, but in its place"
    assert first.pages
    assert first.started
    assert play.gate.pins[B.digest] == 1
    assert not runs(second)
    assert not runs(third)
    assert not first.computed
    play.scheduler.finish(first)
    play.step()
    assert runs(second)
    assert not runs(third)


def test_time_that_a_row_was_held_does_not_count_as_waiting() -> None:
    play = Play(max_rows=3, fuse_hold_steps=20).seen()
    for _ in range(3):
        play.add(A, 100)
    play.steps(2)
    waiting = play.add(B, 5)
    play.steps(10)
    assert waiting.held_seconds == pytest.approx(0.3)
    limit = play.config.queue_timeout
    assert list(play.scheduler.expired(limit + 0.29)) == []
    assert list(play.scheduler.expired(limit + 0.31)) == [waiting]


def test_a_held_row_can_be_ended_and_the_window_goes_on() -> None:
    play, other = one_among_many()
    play.steps(3)
    assert runs(other)
    play.scheduler.finish(other)
    assert play.gate.pins[B.digest] == 0
    play.steps(30)
    assert play.fused == A
    assert play.windows == 1


def test_a_held_row_gives_its_pages_up_when_there_are_no_others() -> None:
    play = Play(pages=12, max_rows=4, fuse_hold_steps=30).seen()
    first, second = play.add(A, 16, 4), play.add(A, 16, 4)
    play.step()
    held = play.add(B, 4, 12)
    play.step()
    assert runs(held)
    while runs(held):
        assert play.step() <= {first, second}
    assert not runs(held)
    for _ in range(100):
        play.step()
    assert [s.output_length for s in (first, second, held)] == [16, 16, 4]


def test_a_window_whose_rows_have_no_room_makes_way() -> None:
    play, other = one_among_many()
    play.steps(2)
    for sequence in list(play.scheduler.running):
        if sequence is not other:
            play.scheduler._preempt(sequence)
            play.gate.absent.update(m.digest for m in sequence.request.mix.members)
    assert play.step() == {other}
    play, other = one_among_many(fuse_cooldown=0)
    everyone = (play.fused, play.scheduler.running, play.scheduler.waiting)
    assert play.policy.exclusive(*everyone) == A
    play.policy.give_way()
    assert play.policy.exclusive(*everyone) is None
    assert play.policy.exclusive(*everyone) == A
