"""When to write a mix into the weights, and who is held back meanwhile. Plain Python, no tensors.

A *fused window* is a run of steps on fused weights. It opens in one of two ways:

- All rows, running and waiting, agree on one mix and have enough steps ahead to pay for the writes.
  Nobody is held back; it closes before the first step with another mix.
- One mix dominates (`EngineConfig.fuse_share` < 1): only its rows run, the others are *held back*.
  They keep their pages, pins and places, and nothing is computed twice.

Holding back is paid with credit. A step that holds a row back costs the row one of its
`fuse_hold_steps`, any other step gives back s / (1 - s) of one, s being `fuse_hold_share`; a window
closes before it would overdraw anybody's credit, and opens only when all who would be held back
have theirs in full. It follows that

    of any T successive steps since it arrived, a row is held back in at most s·T + (1 - s)·N,

N = `fuse_hold_steps`; so in at most N steps in a row, and in the long run in a share s of them.
What is held back waits for its place in the queue as if there were no window: windows decide which
rows get tokens, never who is admitted before whom.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field
from statistics import median
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from gossamer.engine.config import EngineConfig
    from gossamer.engine.sequence import Sequence
    from gossamer.merge import Mix

#: Decode steps that a window's prediction looks back on; a median, since a step that captures a
#: program or shares its cores takes many times the others'.
_SEEN_STEPS: Final = 9
_FEWEST_SEEN: Final = 3

#: Rows that read an adapter's entries together.
_ROWS_AT_ONCE: Final = 16


@dataclass(frozen=True)
class DeltaCosts:
    """What deltas cost in a decode step, and what writing them into the weights costs. Seconds.

    Attributes:
        weight: of a step, for each patched weight that has deltas.
        entry: of a step, for each entry and each `_ROWS_AT_ONCE` rows.
        write: for each entry, to fuse it or to restore it.
    """

    weight: float
    entry: float
    write: float


_CPU: Final = DeltaCosts(weight=35e-6, entry=0.32e-9, write=20e-9)

#: "cpu": SmolLM2-135M on two cores; from the decision records on the CPU's sparse kernels (5.1 ms
#: for 1 % on all rows; 27 ms for 85 M entries) and on serving (20 ms to write 1.06 M entries).
#: "triton": predicted, from the byte model of an H100: 4 bytes an entry at 0.8 of 3.3 TB/s, a
#: launch that moves little 3 µs, 42 M entries fused and restored in 2 ms.
#: "reference" checks the others, and nobody serves by it.
COSTS: Final[Mapping[str, DeltaCosts]] = {
    "cpu": _CPU,
    "reference": _CPU,
    "triton": DeltaCosts(weight=3e-6, entry=1.5e-12, write=2.4e-11),
}


@dataclass(frozen=True)
class MixSize:
    """Stored entries over all of a mix's members, and how many patched weights they touch."""

    entries: int
    weights: int


class Deviations:
    """How far 16-bit sums are from each mix, measured once while its adapters are resident.

    Args:
        measure: mix → its deviation (`gossamer.kernels.scatter.rounding`).
        resident: whether everything that the mix needs is in memory.
    """

    def __init__(self, measure: Callable[[Mix], float], resident: Callable[[Mix], bool]) -> None:
        self._measure = measure
        self._resident = resident
        self._known: dict[str, tuple[Mix, float]] = {}

    def of(self, mix: Mix) -> float:
        """The deviation of a mix that is resident."""
        if mix.digest not in self._known:
            kept = {d: known for d, known in self._known.items() if self._resident(known[0])}
            self._known = {**kept, mix.digest: (mix, self._measure(mix))}
        return self._known[mix.digest][1]


@dataclass
class FusionPolicy:
    """Decides, step by step, which mix the weights should hold and whether others are held back.

    Attributes:
        config: limits and policy.
        allowed: whether anything may be fused at all.
        size: how large a mix is whose adapters are resident.
        permits: whether a resident mix may be fused; asked last, when all else speaks for it.
        costs: of deltas and of writing them.
    """

    config: EngineConfig
    allowed: bool
    size: Callable[[Mix], MixSize]
    permits: Callable[[Mix], bool]
    costs: DeltaCosts
    _cooldown: int = 0
    _seconds: deque[float] = field(default_factory=lambda: deque(maxlen=_SEEN_STEPS))

    def exclusive(
        self, current: Mix | None, running: Collection[Sequence], waiting: Collection[Sequence]
    ) -> Mix | None:
        """The one mix whose rows may run in the next step; None: everybody's may.

        Args:
            current: what the weights hold now.
            running, waiting: everyone, before the next step is scheduled.
        """
        if not self.allowed or self.config.fuse_share >= 1:
            return None
        mix = current if current is not None else _most_common(running)
        if mix is None:
            return None
        everyone = [*running, *waiting]
        others = [s for s in everyone if s.request.mix.digest != mix.digest]
        ours = [s for s in running if s.request.mix.digest == mix.digest]
        if not ours or not others:
            return None
        if (len(everyone) - len(others)) / len(everyone) < self.config.fuse_share:
            return None
        if self._cooldown:
            self._cooldown -= 1
            return None
        if current is not None:
            within = all(s.debt + 1 <= self.config.fuse_hold_steps for s in others)
            return mix if within and self._gain(mix, ours, others, 1) > 0 else None
        if any(s.debt for s in others):
            return None
        steps = min(self.config.fuse_hold_steps, median(s.remaining for s in ours))
        written = 2 * self.costs.write * self.size(mix).entries
        return mix if self._gain(mix, ours, others, steps) > written and self.permits(mix) else None

    def target(
        self, current: Mix | None, running: Iterable[Sequence], waiting: Iterable[Sequence]
    ) -> Mix | None:
        """The mix that the weights should hold during a step in which nobody is held back.

        Args:
            current: what they hold now.
            running: the rows of the next step.
            waiting: those that would like to join.

        Returns:
            None for the bare base.
        """
        rows = list(running)
        mixes = {s.request.mix.digest for s in rows}
        if current is not None:
            if mixes <= {current.digest}:
                return current
            self._cooldown = self.config.fuse_cooldown
        if not self.allowed or len(mixes) != 1 or not rows[0].request.mix.members:
            return None
        if any(s.request.mix.digest not in mixes for s in waiting):
            return None
        if self._cooldown:
            self._cooldown -= 1
            return None
        if max(s.remaining for s in rows) < self.config.fuse_min_steps:
            return None
        return rows[0].request.mix if self.permits(rows[0].request.mix) else None

    def give_way(self) -> None:
        """The rows that alone might run have no room: let the others run, at least once."""
        self._cooldown = max(self.config.fuse_cooldown, 1)

    def saw(self, seconds: float) -> None:
        """Note how long a step took that decoded only, on the bare base's weights."""
        self._seconds.append(seconds)

    def settle(
        self,
        only: Mix | None,
        running: Iterable[Sequence],
        waiting: Iterable[Sequence],
        seconds: float,
    ) -> int:
        """Charge a step that has run to those whom it held back, and credit it to all others.

        Args:
            only: whose rows ran; None: everybody's.
            running, waiting: everyone who was there.
            seconds: what the step took. Whoever waits does not wait longer in the queue for it.

        Returns:
            How many running rows were held back.
        """
        if self.config.fuse_share >= 1:
            return 0
        share = self.config.fuse_hold_share
        earned = share / (1 - share)
        held = 0
        for queue, is_running in ((running, True), (waiting, False)):
            for sequence in queue:
                if only is None or sequence.request.mix.digest == only.digest:
                    sequence.debt = max(0.0, sequence.debt - earned)
                else:
                    sequence.debt += 1
                    sequence.held_seconds += seconds
                    held += is_running
        return held

    def _gain(
        self, mix: Mix, ours: Collection[Sequence], others: Collection[Sequence], steps: float
    ) -> float:
        """Seconds that a window of so many steps saves, before what writing costs.

        A step saves the mix's own deltas; those of the others are only put off. It loses the share
        of the step's tokens that the others would have drawn, at what a step takes now.
        """
        if len(self._seconds) < _FEWEST_SEEN:
            return 0.0
        size, rows = self.size(mix), len(ours)
        chunks = -(-rows // _ROWS_AT_ONCE)
        saved = size.weights * self.costs.weight + chunks * size.entries * self.costs.entry
        held = min(len(others), self.config.max_rows - rows)
        return steps * (saved - median(self._seconds) * held / (rows + held))


def _most_common(rows: Iterable[Sequence]) -> Mix | None:
    """The mix that most rows share, unless that is the base."""
    mixes = {s.request.mix.digest: s.request.mix for s in rows}
    counts = Counter(s.request.mix.digest for s in rows)
    mix = mixes[max(counts, key=counts.__getitem__)] if counts else None
    return mix if mix is not None and mix.members else None
