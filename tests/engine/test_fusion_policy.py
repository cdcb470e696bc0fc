"""When a fused window opens, and when it may not. No tensors."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest

from gossamer.engine.config import EngineConfig
from gossamer.engine.fusion import COSTS, Deviations, FusionPolicy, MixSize
from gossamer.engine.messages import Request, Sampling
from gossamer.engine.sequence import Sequence
from gossamer.merge import BASE, Mix
from tests.engine.windows import A, B, C, Play, one_among_many


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
