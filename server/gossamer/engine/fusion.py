"""When to write a mix into the weights. Plain Python, no tensors.

A *fused window* opens when all rows, running and waiting, agree on one mix and have enough steps
ahead to pay for the writes; it closes before the first step with another mix. The writes of a
1 % adapter cost about as much as its delta terms in six decode steps.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from gossamer.engine.config import EngineConfig
    from gossamer.engine.sequence import Sequence
    from gossamer.merge import Mix


@dataclass
class FusionPolicy:
    """Decides, step by step, which mix the weights should hold."""

    config: EngineConfig
    allowed: bool
    _cooldown: int = 0

    def target(
        self, current: Mix | None, running: Iterable[Sequence], waiting: Iterable[Sequence]
    ) -> Mix | None:
        """The mix that the weights should hold during the next step; None for the bare base.

        Args:
            current: what they hold now.
            running: the rows of the next step.
            waiting: those that would like to join.
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
        return rows[0].request.mix
