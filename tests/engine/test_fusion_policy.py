"""Fused windows: when one opens, whom it holds back and for how long. No tensors."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gossamer.engine.config import EngineConfig
from gossamer.engine.fusion import COSTS, DeltaCosts, Deviations, FusionPolicy, MixSize
from gossamer.engine.memory import Memory
from gossamer.engine.messages import Request, Sampling
from gossamer.engine.scheduler import Scheduler
from gossamer.engine.sequence import Phase, Sequence
from gossamer.merge import BASE, Mix
from tests.engine.test_scheduler import Gate, mix

SIZE = 4
A, B, C = (mix(name) for name in "abc")
#: Deltas so dear that every window pays.
DEAR = DeltaCosts(weight=10.0, entry=0.0, write=0.0)


class Play:
    """Scheduler and policy, with the rest of the engine played by hand.

    Attributes:
        held: per sequence, for each step that it was there: whether a window held it back.
        idle: the same: whether it got no token.
    """

    def __init__(
        self,
        pages: int = 2000,
        costs: DeltaCosts = DEAR,
        policy: type[FusionPolicy] = FusionPolicy,
        **config: Any,
    ) -> None:
        chosen = {"max_rows": 8, "fuse_cooldown": 0, "fuse_share": 0.5} | config
        self.config = EngineConfig(page_size=SIZE, **chosen)
        self.memory: Memory[object] = Memory(pages * 10, 10, SIZE)
        self.gate = Gate()
        self.scheduler = Scheduler(self.config, self.memory, self.gate)
        self.policy = policy(self.config, True, lambda _: MixSize(1000, 1), lambda _: True, costs)
        self.fused: Mix | None = None
        self.held: dict[Sequence, list[bool]] = defaultdict(list)
        self.idle: dict[Sequence, list[bool]] = defaultdict(list)
        self.windows = 0
        self.count = 0

    def add(self, wanted: Mix, max_tokens: int, prompt: int = 1) -> Sequence:
        self.count += 1
        tokens = tuple([self.count] * prompt)
        request = Request(str(self.count), tokens, wanted, Sampling(max_tokens=max_tokens))
        sequence = Sequence(request, 0, b"r", 0.0)
        self.scheduler.add(sequence)
        return sequence

    def step(self) -> set[Sequence]:
        """One turn of the loop; returns who got tokens."""
        only = self.policy.exclusive(self.fused, self.scheduler.running, self.scheduler.waiting)
        work, failed = self.scheduler.schedule(only)
        assert not failed
        self.memory.check_integrity()
        if not work:
            if only is not None:
                self.policy.give_way()
            return set()
        running, waiting = list(self.scheduler.running), list(self.scheduler.waiting)
        rows = [w.sequence for w in work]
        before, self.fused = self.fused, only or self.policy.target(self.fused, rows, waiting)
        self.windows += self.fused is not None and self.fused != before
        wanted = {s.request.mix for s in rows}
        assert self.fused is None or wanted == {self.fused}, "a row ran on another's weights"
        for sequence in (*running, *waiting):
            self.held[sequence].append(only is not None and sequence.request.mix != only)
            self.idle[sequence].append(sequence not in rows)
        for w in work:
            draws = w.draws
            w.sequence.advance(self.memory, w.count)
            if draws:
                w.sequence.tokens.append(0)
                if w.sequence.remaining <= 0:
                    self.scheduler.finish(w.sequence)
        if self.fused is None and all(w.count == 1 for w in work):
            self.policy.saw(0.03)
        self.policy.settle(only, running, waiting, 0.03)
        return set(rows)

    def steps(self, count: int) -> None:
        for _ in range(count):
            self.step()

    def seen(self) -> Play:
        """As after some ordinary decode steps."""
        for _ in range(3):
            self.policy.saw(0.03)
        return self


def within_bounds(held: list[bool], most: int, share: float) -> bool:
    """Whether of any T successive steps at most share·T + (1 - share)·most were held."""
    sums = [0]
    for step in held:
        sums.append(sums[-1] + step)
    return all(
        sums[end] - sums[start] <= share * (end - start) + (1 - share) * most + 1e-9
        for start in range(len(held))
        for end in range(start + 1, len(held) + 1)
    )


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


def one_among_many(
    policy: type[FusionPolicy] = FusionPolicy, **config: Any
) -> tuple[Play, Sequence]:
    """Three long rows of one mix, and one of another that comes later."""
    chosen = {"fuse_hold_steps": 10, "fuse_hold_share": 0.5} | config
    play = Play(policy=policy, **chosen).seen()
    for _ in range(3):
        play.add(A, 200)
    play.steps(5)
    return play, play.add(B, 40)


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


def test_only_a_mix_that_enough_rows_want_holds_others_back() -> None:
    for share, opens in ((0.75, True), (0.76, False)):
        play, other = one_among_many(fuse_share=share)
        play.steps(10)
        assert any(play.held[other]) == opens
    play = Play().seen()
    for _ in range(3):
        play.add(BASE, 50)
    play.add(A, 50)
    play.steps(20)
    assert play.windows == 0, "the base is there already"


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


def opens(
    policy: FusionPolicy, ours: int, others: int, remaining: int = 500, entries: int = 1_060_000
) -> bool:
    """Whether a window opens for `ours` rows of a mix among `others`."""
    policy.size = lambda _: MixSize(entries, 120)
    running = [
        Sequence(Request(str(i), (1,), A if i < ours else B, Sampling(remaining)), 0, None, 0.0)
        for i in range(ours + others)
    ]
    return policy.exclusive(None, running, []) is not None


def real(**config: Any) -> FusionPolicy:
    """The policy of a server on a CPU whose decode steps took 34 ms just now, once 3 s."""
    play = Play(costs=COSTS["cpu"], max_rows=16, fuse_share=0.5, **config)
    for seconds in (0.034, 0.034, 0.036, 3.0, 0.033):
        play.policy.saw(seconds)
    return play.policy


def test_a_window_opens_only_if_it_is_predicted_to_pay() -> None:
    assert opens(real(), 15, 1), "4.5 ms of deltas a step for a sixteenth of 34 ms"
    assert not opens(real(), 13, 3), "and for three of them"
    assert opens(real(fuse_hold_steps=200), 13, 3, entries=42_000_000), "17 ms of deltas"
    assert not opens(real(), 13, 3, entries=42_000_000), "which do not pay for 1.7 s of writes"
    assert not opens(real(), 15, 1, remaining=10), "ten steps do not pay for the writes"
    assert not opens(real(fuse_hold_steps=10), 15, 1)
    assert opens(real(fuse_hold_steps=100), 15, 1, remaining=30)


def test_without_measured_steps_nothing_is_predicted() -> None:
    policy = real()
    policy._seconds.clear()
    assert not opens(policy, 15, 1)
    for _ in range(3):
        policy.saw(0.034)
    assert opens(policy, 15, 1)


def test_a_mix_that_may_not_be_fused_holds_nobody_back() -> None:
    asked = []

    def refuse(mix: Mix) -> bool:
        asked.append(mix)
        return False

    play, other = Play(), None
    play.policy.permits = refuse
    for _ in range(3):
        play.add(A, 50)
    play.steps(3)
    assert asked == [A] * 3
    assert play.fused is None
    other = play.add(B, 5)
    play.steps(5)
    assert asked[3:] == [A] * 5
    assert play.idle[other] == [False] * 5
    policy = real()
    policy.permits = refuse
    del asked[:]
    assert not opens(policy, 13, 3)
    assert not asked, "what would not pay is not measured"
    assert not opens(policy, 15, 1)
    assert asked == [A]


def test_nothing_opens_during_the_cooldown_of_a_broken_window() -> None:
    play, other = one_among_many(fuse_hold_steps=2, fuse_cooldown=6)
    play.steps(30)
    starts = [i for i, h in enumerate(play.held[other]) if h and not play.held[other][i - 1]]
    assert starts[0] == 0
    assert all(b - a >= 8 for a, b in pairwise(starts))


def test_deviations_are_measured_once_and_forgotten_with_the_residents() -> None:
    measured: list[Mix] = []
    resident = {A.digest, B.digest}

    def measure(mix: Mix) -> float:
        measured.append(mix)
        return 0.01 * len(measured)

    deviations = Deviations(measure, lambda mix: mix.digest in resident)
    assert [deviations.of(A), deviations.of(B), deviations.of(A)] == [0.01, 0.02, 0.01]
    resident.discard(A.digest)
    deviations.of(C)
    assert deviations.of(B) == 0.02
    assert deviations.of(A) == 0.04
    assert measured == [A, B, C, A]


@pytest.mark.parametrize(
    "wrong",
    [
        {"fuse_share": 0.0},
        {"fuse_share": 1.1},
        {"fuse_share": float("nan")},
        {"fuse_hold_steps": 0},
        {"fuse_hold_share": 1.0},
        {"fuse_hold_share": -0.1},
        {"fuse_deviation": -1.0},
        {"fuse_deviation": float("nan")},
    ],
)
def test_settings_that_make_no_sense_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        EngineConfig(**wrong)
