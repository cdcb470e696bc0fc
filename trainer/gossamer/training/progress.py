"""What a run tells while it goes on: small frozen values, given to whoever watches."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from gossamer.training.methods.method import Density


@dataclass(frozen=True)
class Started:
    """The run is about to begin; every default has been settled.

    Attributes:
        method: its name.
        density: how many values are trained, of how many.
        weights: number of target weights.
        learning_rate: the peak.
        steps: updates to come.
        phases: these, by what the method does with them, in order.
        examples: that are trained on.
        held_out: that are evaluated on.
        dropped: that were longer than the maximum, of both kinds.
        device: where it runs.
        untrainable: classes of the base's modules with matrices that no target can name, like a
            mixture's experts; these stay as they are.
    """

    method: str
    density: Density
    weights: int
    learning_rate: float
    steps: int
    phases: Mapping[str, int]
    examples: int
    held_out: int
    dropped: int
    device: str
    untrainable: tuple[str, ...]

    @property
    def warning(self) -> str:
        """What people should know of the weights that stay as they are; empty if there are none."""
        if not self.untrainable:
            return ""
        names = ", ".join(self.untrainable)
        return f"The weights of {names} are in no torch.nn.Linear and cannot be trained."


@dataclass(frozen=True)
class Step:
    """An update was made.

    Attributes:
        step: its number, from 1, over all phases of the run.
        steps: how many there will be.
        phase: what the method is doing, like "calibrate" or "train".
        loss: mean over the trained tokens of this step, in nats.
        learning_rate: that it was made with.
        tokens: processed until now, in all phases of the run, padding not counted.
        tokens_per_second: in this phase.
        eta: seconds to the last step, at this pace.
        nnz: number of trained values.
        memory: bytes at the fullest of this phase so far: of the process in host memory, or
            allocated on the GPU.
    """

    step: int
    steps: int
    phase: str
    loss: float
    learning_rate: float
    tokens: int
    tokens_per_second: float
    eta: float
    nnz: int
    memory: int


@dataclass(frozen=True)
class Evaluation:
    """The held-out examples were measured.

    Attributes:
        step: after this many updates.
        loss: mean over their trained tokens, in nats.
        token_accuracy: share of these tokens that come first given all before them.
        exact_match: share of the examples whose every such token does: greedy decoding answers
            them letter for letter.
        tokens: how many tokens these are.
    """

    step: int
    loss: float
    token_accuracy: float
    exact_match: float
    tokens: int


class Watcher(Protocol):
    """Somebody who watches a run; called from the thread that trains, so it should be quick."""

    def started(self, event: Started) -> None:
        """Before the first step, and before the first evaluation."""

    def stepped(self, event: Step) -> None:
        """After each update."""

    def evaluated(self, event: Evaluation) -> None:
        """After each evaluation of the held-out examples."""


class Silent:
    """A watcher that says nothing; a base class for those that care about some events only."""

    def started(self, event: Started) -> None:
        """Say nothing."""

    def stepped(self, event: Step) -> None:
        """Say nothing."""

    def evaluated(self, event: Evaluation) -> None:
        """Say nothing."""
