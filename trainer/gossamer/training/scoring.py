"""The gradient that positions are scored by: of the whole difference, on the examples of a step."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from gossamer.training.batches import IGNORED
from gossamer.training.config import TrainConfig
from gossamer.training.dense import DenseLinear
from gossamer.training.loop import Batch
from gossamer.training.trainee import Trainee, autocast

#: step of the phase from 1, the layers, and a function that gives ∂L/∂Ŵ of the step's examples
AfterStep = Callable[[int, Mapping[str, DenseLinear], Callable[[], Mapping[str, Tensor]]], None]


class Scoring:
    """Calls a method after each step, with the gradient of the differences, should it want it.

    Args:
        config: of the run.
        trainee: the model.
        after_step: the method's; it may set the layers' masks.
        trained: of all layers that are attached, those that are trained densely.
    """

    def __init__(
        self,
        config: TrainConfig,
        trainee: Trainee,
        after_step: AfterStep,
        trained: Callable[[Mapping[str, Any]], Mapping[str, DenseLinear]],
    ) -> None:
        self._config = config
        self._trainee = trainee
        self._after_step = after_step
        self._trained = trained

    def on(self, layers: Mapping[str, Any]) -> Callable[[int, Sequence[Batch]], None]:
        """What the loop calls with a step and the batches that it was made of."""
        mine = self._trained(layers)

        def after(step: int, batches: Sequence[Batch]) -> None:
            self._after_step(step, mine, lambda: self._gradient(mine, batches))

        return after

    def _gradient(
        self, layers: Mapping[str, DenseLinear], batches: Sequence[Batch]
    ) -> dict[str, Tensor]:
        """By weight, float32 [out, in]: of the mean loss of all batches, no mask set."""
        masks = {name: layer.mask for name, layer in layers.items()}
        tokens, device = self._trainee.tokens, next(self._trainee.parameters()).device
        count = sum(int((batch["labels"] != IGNORED).sum()) for batch in batches)
        values = [layer.values for layer in layers.values()]
        sums: list[Tensor] = []
        try:
            for layer in layers.values():
                layer.mask = None
            for batch in batches:
                inputs = {key: tensor.to(device) for key, tensor in batch.items()}
                with autocast(self._config, device):
                    loss = self._trainee(**inputs, num_items_in_batch=count)["loss"]
                found = torch.autograd.grad(loss, values)
                # the first batch's tensors hold the sum: no dense copy more than there must be
                for total, part in zip(sums, found, strict=False):
                    total += part
                sums = sums or list(found)
            return dict(zip(layers, sums, strict=True))
        finally:
            self._trainee.tokens = tokens
            for name, layer in layers.items():
                layer.mask = masks[name]
