"""The base as the loop sees it: batches in, a loss out, and how held-out examples fare."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial

import psutil  # type: ignore[import-untyped]  # accelerate depends on it
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import GradientCheckpointingLayer

from gossamer.training.batches import IGNORED, collate
from gossamer.training.config import TrainConfig
from gossamer.training.data import never
from gossamer.training.encode import Encoded
from gossamer.training.errors import ConfigError, StoppedError
from gossamer.training.loss import summed_cross_entropy
from gossamer.training.overriding import overriding
from gossamer.training.progress import Evaluation


class Trainee(nn.Module):
    """The base as the Trainer sees it: batches of `collate` in, the loss out.

    The Trainer is given this module and not the base, so that nothing it does to its model stays on
    the base.
    """

    #: tells the Trainer that the loss is divided by the tokens of the whole update already
    accepts_loss_kwargs = True

    def __init__(self, base: nn.Module) -> None:
        super().__init__()
        self.base = base
        self._takes_logits_to_keep = "logits_to_keep" in inspect.signature(base.forward).parameters
        #: phase → bytes in use, at the fullest that was seen
        self.memory: dict[str, int] = {}
        self._phase = ""
        #: tokens processed so far, padding not counted
        self.tokens = 0

    def train(self, mode: bool = True) -> Trainee:  # noqa: ARG002
        """Stay in eval mode: no dropout, so that what is trained is what is served."""
        return self

    def forward(
        self, labels: Tensor, num_items_in_batch: Tensor | int | None = None, **inputs: Tensor
    ) -> dict[str, Tensor]:
        """The loss in nats, summed over the labels and divided by `num_items_in_batch`."""
        logits = self.logits(labels.shape[1], inputs)
        flat = labels.reshape(-1)
        self.look_at_memory()
        loss = summed_cross_entropy(logits.reshape(flat.numel(), -1), flat)
        self.tokens += tokens_of(inputs)
        count = (flat != IGNORED).sum() if num_items_in_batch is None else num_items_in_batch
        return {"loss": loss / count}

    def enter(self, phase: str) -> None:
        """Count the memory in use for this phase from now on."""
        self._phase = phase
        device = next(self.parameters()).device
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)

    def look_at_memory(self) -> None:
        """Remember the memory in use, if it is the phase's most so far."""
        used = memory_in_use(next(self.parameters()).device)
        self.memory[self._phase] = max(self.memory.get(self._phase, 0), used)

    def logits(self, scored: int, inputs: dict[str, Tensor]) -> Tensor:
        """float32 [rows, scored, vocabulary] of the last positions."""
        if self._takes_logits_to_keep:
            logits: Tensor = self.base(**inputs, logits_to_keep=scored, use_cache=False).logits
        else:
            logits = self.base(**inputs, use_cache=False).logits
        return logits[:, -scored:].float()


def tokens_of(inputs: dict[str, Tensor]) -> int:
    """Tokens of a batch, padding not counted."""
    mask = inputs.get("attention_mask")
    return int(inputs["input_ids"].numel() if mask is None else mask.sum())


def memory_in_use(device: torch.device) -> int:
    """Bytes: allocated on a GPU at most since the phase began, or held by this process now."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    return int(psutil.Process().memory_info().rss)


def autocast(config: TrainConfig, device: torch.device) -> AbstractContextManager[None]:
    """The context in which forward passes run."""
    if config.precision == "fp32":
        return nullcontext()
    return torch.autocast(device.type, torch.bfloat16)


def checkpointing(model: nn.Module, *, on: bool) -> AbstractContextManager[None]:
    """Recompute the layers' activations in backward passes instead of keeping them.

    Around the layers' forward passes: the model's own switch works for layers in training mode
    only, where some have dropout too, and leaves a hook on the embedding that asks for a gradient.

    Raises:
        ConfigError: the architecture cannot.
    """
    if not on:
        return nullcontext()
    layers = [m for m in model.modules() if isinstance(m, GradientCheckpointingLayer)]
    if not layers:
        raise ConfigError("gradient_checkpointing", f"{type(model).__name__} cannot do it")
    kept = partial(checkpoint, use_reentrant=False, preserve_rng_state=False)
    return overriding(layers, lambda layer: partial(kept, layer.forward))


@dataclass(frozen=True)
class Outcome:
    """How one held-out example fares.

    Attributes:
        loss: summed over its trained tokens, in nats.
        tokens: how many these are, the end-of-sequence tokens included.
        right: how many of them come first given all before them.
    """

    loss: float
    tokens: int
    right: int

    @property
    def exact(self) -> bool:
        """Whether every trained token comes first given those before it.

        Greedy decoding from the prompt then gives the completion, and stops where it does; it goes
        wrong exactly where the first of them does not come first. So this is what generating and
        comparing would find, for one forward pass (but for two tokens that are as likely within
        rounding). In a conversation of several answers each is decoded after the true ones before.
        """
        return self.right == self.tokens


@torch.no_grad()
def outcomes(
    config: TrainConfig,
    trainee: Trainee,
    examples: Sequence[Encoded],
    pad_id: int,
    *,
    stop: Callable[[], bool] = never,
    step: int = 0,
) -> list[Outcome]:
    """How each example fares as the model stands, in their order.

    Never packed, whatever `config.packing` says: one row is one example.

    Args:
        stop: asked before each batch.
        step: of the run, for the error.

    Raises:
        StoppedError: `stop` said so. The model is as it was, so this may be done again.
    """
    device = next(trainee.parameters()).device
    found: list[Outcome] = []
    for begin in range(0, len(examples), config.batch_size):
        if stop():
            raise StoppedError(step, resumable=False)
        rows = examples[begin : begin + config.batch_size]
        batch = {key: tensor.to(device) for key, tensor in collate(rows, pad_id).items()}
        labels = batch.pop("labels")
        with autocast(config, device):
            logits = trainee.logits(labels.shape[1], batch)
        for row, wanted in zip(logits, labels, strict=True):
            trained = wanted != IGNORED
            found.append(_outcome(row[trained], wanted[trained]))
    return found


def _outcome(logits: Tensor, wanted: Tensor) -> Outcome:
    loss = F.cross_entropy(logits, wanted, reduction="sum")
    right = (logits.argmax(-1) == wanted).sum()
    return Outcome(float(loss), wanted.numel(), int(right))


def evaluate(
    config: TrainConfig,
    trainee: Trainee,
    held_out: Sequence[Encoded],
    pad_id: int,
    step: int,
    *,
    stop: Callable[[], bool] = never,
) -> Evaluation:
    """Loss, token accuracy and exact match on the held-out examples, as the model stands.

    Exact match is the share of `Outcome.exact`: that of the examples that greedy decoding answers
    letter for letter, without decoding any.

    Raises:
        StoppedError: `stop`, asked before each batch, said so.
    """
    found = outcomes(config, trainee, held_out, pad_id, stop=stop, step=step)
    tokens = sum(one.tokens for one in found)
    return Evaluation(
        step=step,
        loss=sum(one.loss for one in found) / tokens,
        token_accuracy=sum(one.right for one in found) / tokens,
        exact_match=sum(one.exact for one in found) / len(found),
        tokens=tokens,
    )
