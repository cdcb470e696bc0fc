"""Who runs in the next step, and with how many tokens. Plain Python, no tensors.

Every step takes one token of each decoding row, then as much of the prompts as the token budget
allows. A waiting request whose adapter is not in memory does not block the ones behind it. While
only one mix may run (a fused window, see `fusion`), everyone else keeps what it has, and those that
wait are admitted in their order, but get no tokens.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from gossamer.engine.errors import EngineError
from gossamer.engine.sequence import Phase, Sequence

if TYPE_CHECKING:
    from gossamer.engine.config import EngineConfig
    from gossamer.engine.memory import Memory
    from gossamer.merge import Mix


class Gate(Protocol):
    """Whether what a mix needs is in memory."""

    def ready(self, mix: Mix, keep: Collection[str]) -> bool:
        """Start loading if need be, evicting none of `keep`. Raises `EngineError` on failure."""

    def wanted(self, mix: Mix) -> list[str]:
        """The keys of what it needs."""

    def pin(self, mix: Mix) -> None:
        """Keep what the mix needs in memory."""

    def unpin(self, mix: Mix) -> None:
        """Undo one `pin`."""


@dataclass(frozen=True)
class Work:
    """A sequence's share of a step: tokens [start, start + count)."""

    sequence: Sequence
    start: int
    count: int

    @property
    def draws(self) -> bool:
        """Whether a token is drawn after it: it reaches the end of the known tokens."""
        return self.start + self.count == len(self.sequence.tokens)


class Scheduler:
    """The waiting, the running, and the choice between them."""

    def __init__(self, config: EngineConfig, memory: Memory[Any], gate: Gate) -> None:
        self._config = config
        self._memory = memory
        self._gate = gate
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []

    def add(self, sequence: Sequence) -> None:
        """Queue a sequence behind those of equal or lower priority number."""
        priority = sequence.request.priority
        if not self.waiting or self.waiting[-1].request.priority <= priority:
            self.waiting.append(sequence)
            return
        at = next(i for i, s in enumerate(self.waiting) if s.request.priority > priority)
        self.waiting.insert(at, sequence)

    def schedule(
        self, only: Mix | None = None
    ) -> tuple[list[Work], list[tuple[Sequence, EngineError]]]:
        """The work of the next step, and the sequences that cannot be served (already removed).

        Args:
            only: the mix whose sequences get tokens; None: all do. There may be no work although
                others could run.
        """
        self._memory.tick()
        work = self._decode(only)
        budget = self._config.max_mixed_step_tokens if work else self._config.max_step_tokens
        for sequence in list(self.running):
            if sequence.phase is Phase.RUNNING and not (sequence.decoding or _held(sequence, only)):
                budget -= self._take(sequence, budget, work)
        failed = self._join(work, budget, only)
        if not work and self.running and only is None:
            self._preempt(self.running[-1])  # rows run but none has room for a token
        return work, failed

    def _join(
        self, work: list[Work], budget: int, only: Mix | None
    ) -> list[tuple[Sequence, EngineError]]:
        """Admit waiting sequences in their order, and have the adapters of the next ones loaded."""
        failed: list[tuple[Sequence, EngineError]] = []
        keep: set[str] = set()
        full = False
        for sequence in list(self.waiting)[: 2 * self._config.max_rows]:
            mix = sequence.request.mix
            try:
                ready = self._gate.ready(mix, keep)
            except EngineError as error:
                self.waiting.remove(sequence)
                failed.append((sequence, error))
                continue
            keep.update(self._gate.wanted(mix))
            full = full or not budget or len(self.running) >= self._config.max_rows
            if full or not ready or sequence.must_wait():
                continue
            if not self._admit(sequence):
                full = True  # nobody behind it may take the pages that it waits for
            elif _held(sequence, only):
                sequence.extend_pages(self._memory, len(sequence.tokens))  # its place, until it may
            else:
                budget -= self._take(sequence, budget, work)
        return failed

    def finish(self, sequence: Sequence, *, trusted: bool = True) -> None:
        """Take a sequence out, wherever it is, and free what it holds. Idempotent."""
        if sequence.phase is Phase.RUNNING:
            self.running.remove(sequence)
            sequence.release(self._memory, trusted=trusted)
            self._gate.unpin(sequence.request.mix)
        elif sequence.phase is Phase.WAITING and sequence in self.waiting:
            self.waiting.remove(sequence)
        sequence.phase = Phase.ENDED

    def expired(self, now: float) -> Iterator[Sequence]:
        """Sequences that waited too long for their first step, not counting what they were held."""
        limit = now - self._config.queue_timeout
        return (
            s
            for s in self.waiting
            if s.index == 0 and not s.started and s.arrived + s.held_seconds < limit
        )

    def _decode(self, only: Mix | None) -> list[Work]:
        work: list[Work] = []
        for sequence in list(self.running):
            if sequence.phase is not Phase.RUNNING or not sequence.decoding:
                continue
            if _held(sequence, only):
                continue
            while not sequence.extend_pages(self._memory, len(sequence.tokens)):
                victim = self.running[-1]  # the youngest gives way, and starts again later
                self._preempt(victim)
                work = [w for w in work if w.sequence is not victim]
                if victim is sequence:
                    break
            else:
                work.append(Work(sequence, sequence.computed, 1))
        return work

    def _take(self, sequence: Sequence, budget: int, work: list[Work]) -> int:
        """Plan up to `budget` pending tokens of a sequence; returns how many."""
        size = self._memory.pages.page_size
        count = min(budget, sequence.pending)
        while count and not sequence.extend_pages(self._memory, sequence.computed + count):
            count = len(sequence.pages) * size - sequence.computed
        if count:
            work.append(Work(sequence, sequence.computed, count))
        return count

    def _admit(self, sequence: Sequence) -> bool:
        """Start a sequence whose adapters are there. False if its tokens find no room."""
        size = self._memory.pages.page_size
        self._gate.pin(sequence.request.mix)
        sequence.attach_prefix(self._memory)
        wanted = -(-len(sequence.tokens) // size) - len(sequence.pages)
        if not self._memory.can_allocate(wanted):
            sequence.release(self._memory)
            self._gate.unpin(sequence.request.mix)
            return False
        self.waiting.remove(sequence)
        self.running.append(sequence)
        sequence.phase = Phase.RUNNING
        sequence.started = True
        return True

    def _preempt(self, sequence: Sequence) -> None:
        self.running.remove(sequence)
        sequence.release(self._memory)
        self._gate.unpin(sequence.request.mix)
        sequence.phase = Phase.WAITING
        self.waiting.appendleft(sequence)


def _held(sequence: Sequence, only: Mix | None) -> bool:
    """Whether a sequence gets no tokens because only another mix may run."""
    return only is not None and sequence.request.mix.digest != only.digest
