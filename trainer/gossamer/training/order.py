"""The order of the examples: shuffled anew for each pass, and the same for each way to train."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch.utils.data import Sampler

from gossamer.training.config import TrainConfig


class Order(Sampler[int]):
    """Indices of examples, from a place in an endless row of shuffled passes on.

    A phase that goes on where another one ended begins at the example that the other would have
    seen next. The passes are those of accelerate's seedable sampler.

    Args:
        count: of examples.
        seed: of the passes; the n-th is shuffled by seed + n.
        first: examples of the row that lie before the first one.
    """

    def __init__(self, count: int, seed: int, first: int = 0) -> None:
        self._count = count
        self._seed = seed
        self._first = first
        self._epoch = 0

    def __len__(self) -> int:
        return self._count

    def set_epoch(self, epoch: int) -> None:
        """What is iterated over next: as many examples as there are, so many times that further."""
        self._epoch = epoch

    def __iter__(self) -> Iterator[int]:
        passes, skipped = divmod(self._first + self._epoch * self._count, self._count)
        yield from self._shuffled(passes)[skipped:]
        yield from self._shuffled(passes + 1)[:skipped]

    def _shuffled(self, number: int) -> list[int]:
        generator = torch.Generator().manual_seed(self._seed + number)
        shuffled: list[int] = torch.randperm(self._count, generator=generator).tolist()
        return shuffled


def updates(config: TrainConfig, examples: int, epochs: float) -> int:
    """How many updates so many passes over the examples make, as the Trainer counts them."""
    return max(1, int(-(-epochs * _updates_of_a_pass(config, examples) // 1)))


def seen(config: TrainConfig, examples: int, made: int) -> int:
    """How many examples so many updates see; the last batch of a pass may be a smaller one."""
    passes, rest = divmod(made, _updates_of_a_pass(config, examples))
    batch = config.batch_size * config.gradient_accumulation
    return passes * examples + min(rest * batch, examples)


def _updates_of_a_pass(config: TrainConfig, examples: int) -> int:
    batches = -(-examples // config.batch_size)
    return -(-batches // config.gradient_accumulation)
