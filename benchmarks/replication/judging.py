"""How a model with an adapter answers held-out examples, one by one."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers import PreTrainedTokenizerBase as Tokenizer

from benchmarks.tasks import Task
from gossamer.store.delta import DeltaSet
from gossamer.training import TrainConfig
from gossamer.training.encode import Encoded
from gossamer.training.trainee import Trainee, outcomes


@dataclass(frozen=True)
class Judged:
    """Attributes:
    right: of each example, in order: whether greedy decoding answers it letter for letter.
    loss: nats per token of the answers; nan where no answer was scored.
    """

    right: Sequence[bool]
    loss: float

    @property
    def accuracy(self) -> float:
        """The share that is right."""
        return sum(self.right) / len(self.right)


def judge(config: TrainConfig, model: PreTrainedModel, held_out: Sequence[Encoded]) -> Judged:
    """The examples' outcomes, as the model stands."""
    found = outcomes(config, Trainee(model), held_out, pad_id=0)
    loss = sum(one.loss for one in found) / sum(one.tokens for one in found)
    return Judged([one.exact for one in found], loss)


@torch.no_grad()
def judge_by_choice(model: PreTrainedModel, tokenizer: Tokenizer, task: Task) -> Judged:
    """Whether the likeliest of each item's choices is the right one: what a base knows that does
    not know the form of the answers."""
    right = []
    for item in task.held_out:
        prompt = tokenizer(item.prompt)["input_ids"]
        answers = [tokenizer(choice)["input_ids"] for choice in item.choices]
        width = max(map(len, answers))
        rows = [prompt + answer + [0] * (width - len(answer)) for answer in answers]
        logits = model(torch.tensor(rows), logits_to_keep=width + 1).logits.log_softmax(-1)
        scores = [
            sum(float(logits[row, at, token]) for at, token in enumerate(answer))
            for row, answer in enumerate(answers)
        ]
        right.append(item.choices[scores.index(max(scores))] == item.completion)
    return Judged(right, float("nan"))


@contextmanager
def patched(model: PreTrainedModel, adapter: DeltaSet) -> Iterator[None]:
    """The model with an adapter added densely, and as it was afterwards."""
    saved: Mapping[str, Tensor] = {
        name: model.get_parameter(name).detach().clone() for name in adapter.deltas
    }
    try:
        with torch.no_grad():
            for name, delta in adapter.deltas.items():
                model.get_parameter(name).add_(torch.from_numpy(delta.dense()))
        yield
    finally:
        with torch.no_grad():
            for name, tensor in saved.items():
                model.get_parameter(name).copy_(tensor)
