"""The engine's thread: schedule → run → sample → deliver, once a step.

Everything that decides is plain Python and happens here, in one thread; other threads only put
messages into the inbox. A request that fails gets its own error; the others do not notice.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

from gossamer.engine.config import EngineConfig
from gossamer.engine.errors import (
    Cancelled,
    EngineError,
    NonFiniteLogits,
    Overloaded,
    ShuttingDown,
    StepFailed,
)
from gossamer.engine.fusion import COSTS, Deviations, FusionPolicy, MixSize
from gossamer.engine.group import Choice, Group
from gossamer.engine.memory import Memory
from gossamer.engine.residency import Applied, Residency, Resident
from gossamer.engine.runner import Runner
from gossamer.engine.sampler import sample
from gossamer.engine.scheduler import Scheduler, Work
from gossamer.engine.sequence import Phase, Sequence
from gossamer.merge import Mix

log = logging.getLogger(__name__)


@dataclass
class Counts:
    """What the loop did so far. `held_row_steps`: rows held back, summed over steps."""

    steps: int = 0
    fused_steps: int = 0
    fused_windows: int = 0
    held_row_steps: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    cached_tokens: int = 0


def _scored(work: list[Work]) -> set[int]:
    """Which entries of a step compute the log-probabilities of their prompt's tokens."""
    return {
        i
        for i, w in enumerate(work)
        if w.sequence.request.sampling.prompt_logprobs is not None
        and w.sequence.index == 0
        and w.start < w.sequence.prompt_length
    }


def _rows(logits: Tensor, indices: list[int]) -> Tensor:
    """Increasing rows of the logits; no copy (0.5 ms for 16 rows of SmolLM2) when that is all."""
    return logits if len(indices) == len(logits) else logits[indices]


class Loop:
    """State of the engine's thread. Only `post`, `wake` and `stop` may be called from others.

    Args:
        may_fuse: whether fusing is on and exact, which takes an fp32 base. With a 16-bit base
            `EngineConfig.fuse_16bit` decides, and the deviation of each mix.
    """

    def __init__(
        self,
        config: EngineConfig,
        memory: Memory[Resident],
        residency: Residency,
        runner: Runner,
        *,
        may_fuse: bool,
    ) -> None:
        self._config = config
        self._memory = memory
        self._residency = residency
        self._runner = runner
        self._exact = may_fuse
        self._fusion = FusionPolicy(
            config,
            may_fuse or (config.fuse and config.fuse_16bit),
            self._size,
            self._permits,
            COSTS[config.kernels],
        )
        self._deviations = Deviations(self._deviation, self._is_resident)
        self._fused: Mix | None = None
        self.scheduler = Scheduler(config, memory, residency)
        self.counts = Counts()
        self.dead: BaseException | None = None
        self._groups: dict[str, Group] = {}
        self._by_sequence: dict[Sequence, tuple[Group, Choice]] = {}
        self._inbox: deque[Callable[[], None]] = deque()
        self._bell = threading.Condition()
        self._unfused_before = False
        self._stopping = False
        self._closed = False

    # -- from other threads

    def post(self, job: Callable[[], None]) -> bool:
        """Have `job` run in the engine's thread before the next step; False if it has ended."""
        with self._bell:
            if self._closed:
                return False
            self._inbox.append(job)
            self._bell.notify()
        return True

    def wake(self) -> None:
        """End a wait for something to do."""
        with self._bell:
            self._bell.notify()

    def stop(self) -> None:
        """Leave the thread after the present step; what is in flight fails."""
        self._stopping = True
        self.wake()

    # -- in the engine's thread

    def add(self, group: Group) -> None:
        """Take a request in (through `post`)."""
        self._groups[group.request.id] = group
        for choice in group.choices:
            self._by_sequence[choice.sequence] = (group, choice)
            self.scheduler.add(choice.sequence)

    def cancel(self, request_id: str) -> None:
        """Fail a request with `Cancelled`, if it is still there (through `post`)."""
        group = self._groups.get(request_id)
        if group is not None:
            self._fail(group, Cancelled("The request was cancelled."))

    def run(self) -> None:
        """The thread's body."""
        try:
            while not self._stopping:
                if not self._turn():
                    self._wait()
        except BaseException as death:
            self.dead = death
            log.exception("the engine's thread died")
        finally:
            self._close()

    def _turn(self) -> bool:
        """Inbox, loads, one step. False when there was nothing to run."""
        while self._inbox:
            self._inbox.popleft()()
        for sequence in list(self.scheduler.expired(time.monotonic())):
            waited = f"The request waited {self._config.queue_timeout:g} s without being started."
            self._fail_sequence(sequence, Overloaded(waited, 1.0))
        running, waiting = self.scheduler.running, self.scheduler.waiting
        only = self._fusion.exclusive(self._fused, running, waiting)
        work, failed = self.scheduler.schedule(only)
        for sequence, error in failed:
            self._fail_sequence(sequence, error)
        self._residency.settle()
        work = [w for w in work if w.sequence.phase is Phase.RUNNING]
        if work:
            self._step(work, only)
            return True
        if only is not None:
            self._fusion.give_way()
        return bool(failed) or bool(self.scheduler.running) or self._unblock()

    def _unblock(self) -> bool:
        """Nothing can run. True if something was done about it, False to wait for news.

        When nothing is fused, running or being loaded, nothing will ever make room for the first
        that waits.
        """
        self._set_fused(None)
        self._runner.forget_bound()
        if not self.scheduler.waiting or not self._residency.idle:
            return False
        if self._unfused_before:
            first = self.scheduler.waiting[0]
            self._fail_sequence(first, self._residency.no_room(first.request.mix))
        self._unfused_before = not self._unfused_before
        return True

    def _wait(self) -> None:
        with self._bell:
            if not self._inbox and not self._stopping and not self._residency.has_news:
                self._bell.wait(timeout=1.0 if self.scheduler.waiting else None)

    def _step(self, work: list[Work], only: Mix | None) -> None:
        self._unfused_before = False
        running, waiting = list(self.scheduler.running), list(self.scheduler.waiting)
        target = only
        if only is None:
            target = self._fusion.target(self._fused, [w.sequence for w in work], waiting)
        self._set_fused(target)
        start = time.perf_counter()
        self._run(work)
        seconds = time.perf_counter() - start
        if self._fused is None and all(w.count == 1 for w in work):
            self._fusion.saw(seconds)
        self.counts.held_row_steps += self._fusion.settle(only, running, waiting, seconds)

    def _run(self, work: list[Work]) -> None:
        self.counts.steps += 1
        self.counts.fused_steps += self._fused is not None
        scored = _scored(work)
        try:
            logits = self._forward(work, scored)
        except torch.AcceleratorError:
            raise  # the device is lost for this process: no row is to blame, and none can run
        except Exception as error:  # isolate: which row it was shows when each runs alone
            self._runner.wait()  # before pages are freed that launches under way still write
            if len(work) == 1:
                log.warning("a request's step failed", exc_info=error)
                self._fail_sequence(work[0].sequence, StepFailed(f"The step failed: {error}"))
                return
            log.warning("a step failed; its %d rows run one by one", len(work), exc_info=error)
            for w in work:
                if w.sequence.phase is Phase.RUNNING:
                    self._run([w])
            return
        self._finish_step(work, scored, logits)

    def _forward(self, work: list[Work], scored: set[int]) -> Tensor:
        applied = [
            () if self._fused is not None else self._residency.applied(w.sequence.request.mix)
            for w in work
        ]
        residents = {key: self._residency.resident(key) for pairs in applied for key, _ in pairs}
        return self._runner.run(work, applied, residents, scored=scored)

    def _finish_step(self, work: list[Work], scored: set[int], logits: Tensor) -> None:
        ends = list(accumulate(w.count if i in scored else 1 for i, w in enumerate(work)))
        # A sum is finite only if every term is; a NaN among a chunk's keys reaches its last row.
        sound = torch.isfinite(_rows(logits, [end - 1 for end in ends]).sum(-1)).tolist()
        drawing: list[tuple[Group, Choice]] = []
        last: list[int] = []
        for i, w in enumerate(work):
            group, choice = self._by_sequence.get(w.sequence, (None, None))
            if group is None or choice is None:
                continue  # a sibling choice of this step was unsound
            if not sound[i]:
                self._fail(group, NonFiniteLogits(group.request.mix.digest))
                continue
            if i in scored and not self._try(
                group, group.score_prompt, w.start, logits[ends[i] - w.count : ends[i]]
            ):
                continue
            if w.start < w.sequence.prompt_length:
                self.counts.prompt_tokens += min(w.count, w.sequence.prompt_length - w.start)
            w.sequence.advance(self._memory, w.count)
            if w.draws:
                drawing.append((group, choice))
                last.append(ends[i] - 1)
        if drawing:
            self._draw(drawing, _rows(logits, last))

    def _draw(self, drawing: list[tuple[Group, Choice]], logits: Tensor) -> None:
        draws = sample(
            logits,
            [choice.chooser for _, choice in drawing],
            [choice.sequence.output_length for _, choice in drawing],
        )
        for (group, choice), drawn in zip(drawing, draws, strict=True):
            if group.over:
                continue
            if isinstance(drawn, EngineError):
                self._fail(group, drawn)
            elif group.request.sampling.max_tokens == 0:
                group.end(choice, "length")
            else:
                self.counts.completion_tokens += 1
                self._try(group, group.take, choice, drawn)
            if choice.ended and not group.failed:
                self._drop(group, choice)

    def _try(self, group: Group, act: Callable[..., None], *args: object) -> bool:
        """Do something for one request; what it raises (a constraint, a decoder) is its own."""
        try:
            act(*args)
        except Exception as error:
            log.warning("request %s failed", group.request.id, exc_info=error)
            self._fail(group, StepFailed(f"The request failed: {error}"))
            return False
        return True

    def _drop(self, group: Group, choice: Choice) -> None:
        self.counts.cached_tokens += choice.sequence.cached_tokens
        self.scheduler.finish(choice.sequence)
        del self._by_sequence[choice.sequence]
        if group.over:
            self._groups.pop(group.request.id, None)

    def _fail_sequence(self, sequence: Sequence, error: EngineError) -> None:
        found = self._by_sequence.get(sequence)
        if found is not None:
            self._fail(found[0], error)

    def _fail(self, group: Group, error: EngineError) -> None:
        """End a whole request; pages of a failed step are not kept for others."""
        trusted = isinstance(error, Cancelled | Overloaded | ShuttingDown)
        for choice in group.choices:
            self.scheduler.finish(choice.sequence, trusted=trusted)
            self._by_sequence.pop(choice.sequence, None)
        self._groups.pop(group.request.id, None)
        group.fail(error)

    def _set_fused(self, mix: Mix | None) -> None:
        """Make the weights hold exactly `mix`."""
        if mix == self._fused:
            return
        if self._fused is not None:
            self._runner.unfuse()
            self._residency.unpin(self._fused)
            self._fused = None
        if mix is not None:
            try:
                self._runner.fuse(*self._members(mix))
            except Exception:
                # Rows are served unfused from now on, or not at all: if the base's weights could
                # not be put back, this raises again and ends the thread.
                self._runner.unfuse()
                log.exception("fusing %s failed; fusing is off from now on", mix.digest)
                self._fusion.allowed = False
                return
            self._residency.pin(mix)
            self._fused = mix
            self.counts.fused_windows += 1

    def _members(self, mix: Mix) -> tuple[Applied, list[Resident]]:
        applied = self._residency.applied(mix)
        return applied, [self._residency.resident(key) for key, _ in applied]

    def _size(self, mix: Mix) -> MixSize:
        deltas = [resident.deltas for resident in self._members(mix)[1]]
        entries = sum(delta.nnz for by_name in deltas for delta in by_name.values())
        return MixSize(entries, len({name for by_name in deltas for name in by_name}))

    def _permits(self, mix: Mix) -> bool:
        """Whether the fused model is the mix, or near enough to it."""
        if self._exact:
            return True
        try:
            deviation = self._deviations.of(mix)
        except Exception:
            log.exception("%s could not be measured; fusing is off from now on", mix.digest)
            self._fusion.allowed = False
            return False
        return deviation <= self._config.fuse_deviation

    def _is_resident(self, mix: Mix) -> bool:
        return all(self._memory.get(key) is not None for key in self._residency.wanted(mix))

    def _deviation(self, mix: Mix) -> float:
        start = time.perf_counter()
        deviation = self._runner.deviation(*self._members(mix))
        seconds = time.perf_counter() - start
        log.info("mix %s deviates by %.3g in 16 bit (%.3f s)", mix.digest, deviation, seconds)
        return deviation

    def _close(self) -> None:
        with self._bell:
            self._closed = True
        reason = "The engine has stopped." if self.dead is None else "The engine's thread died."
        while self._inbox:  # requests that were posted but not yet taken in must be answered too
            self._inbox.popleft()()
        for group in list(self._groups.values()):
            group.fail(ShuttingDown(reason))
        if self.dead is None:
            for group in list(self._groups.values()):
                self._fail(group, ShuttingDown(reason))
            self._set_fused(None)
