"""How the values move: the optimisers, and the learning rate over a run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import cos, pi
from typing import Literal

import torch
from torch.nn import Parameter

Optimizer = Literal["adamw", "rmsprop"]

#: Default rates are AdamW's; times this for another optimiser. RMSProp does not correct the bias of
#: its mean square (0.99 of it is kept): its first update is 10 times the rate, the hundredth 1.3.
SHARE_OF_RATE: Mapping[Optimizer, float] = {"adamw": 1.0, "rmsprop": 0.1}


@dataclass(frozen=True)
class Schedule:
    """The learning rate over a run whose phases may share one schedule.

    Attributes:
        kind: how it falls after the warm-up.
        peak: its largest value.
        warmup: steps in which it rises from 0.
        steps: of the whole schedule.
        offset: steps of it that lie before this phase.
    """

    kind: Literal["linear", "cosine", "constant"]
    peak: float
    warmup: int
    steps: int
    offset: int = 0

    def factor(self, step: int) -> float:
        """The share of the peak at a step of the phase, from 0."""
        at = self.offset + step
        if at < self.warmup:
            # Not at / warmup: the first step would be made with a rate of 0, and a calibration of
            # one step, or MCS's first score, would find nothing changed.
            return (at + 1) / (self.warmup + 1)
        if self.kind == "constant":
            return 1.0
        done = (at - self.warmup) / max(1, self.steps - self.warmup)
        left = max(0.0, 1.0 - done)
        return left if self.kind == "linear" else 0.5 * (1.0 + cos(pi * (1.0 - left)))


def new_optimizer(
    kind: Optimizer, parameters: Sequence[Parameter], rate: float, weight_decay: float
) -> torch.optim.Optimizer:
    """With torch's defaults but for the rate: RMSProp's are those that LoTA's paper trains with.

    AdamW keeps two numbers for each value, RMSProp one.

    Args:
        kind: of the two.
        parameters: what it moves.
        rate: the peak of the learning rate.
        weight_decay: decoupled from the gradient, for both.
    """
    if kind == "adamw":
        return torch.optim.AdamW(parameters, lr=rate, weight_decay=weight_decay)
    made = torch.optim.RMSprop(parameters, lr=rate)
    if weight_decay:
        # torch's own would add it to the gradient, to be scaled as that is.
        made.register_step_pre_hook(lambda *_: _decay(made, weight_decay))
    return made


@torch.no_grad()
def _decay(optimizer: torch.optim.Optimizer, weight_decay: float) -> None:
    for group in optimizer.param_groups:
        for values in group["params"]:
            values.mul_(1.0 - group["lr"] * weight_decay)
