"""Fused windows played by hand: the scheduler and the policy, and no tensors."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

from gossamer.engine.config import EngineConfig
from gossamer.engine.fusion import DeltaCosts, FusionPolicy, MixSize
from gossamer.engine.memory import Memory
from gossamer.engine.messages import Request, Sampling
from gossamer.engine.scheduler import Scheduler
from gossamer.engine.sequence import Sequence
from gossamer.merge import Mix
from tests.engine.test_scheduler import Gate, advance, mix

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
        """A request that arrives; its prompt is so many tokens, and nobody else's."""
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
            advance(self.memory, self.scheduler, w)
        if self.fused is None and all(w.count == 1 for w in work):
            self.policy.saw(0.03)
        self.policy.settle(only, running, waiting, 0.03)
        return set(rows)

    def steps(self, count: int) -> None:
        """So many turns."""
        for _ in range(count):
            self.step()

    def seen(self) -> Play:
        """As after some ordinary decode steps."""
        for _ in range(3):
            self.policy.saw(0.03)
        return self


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
