"""The papers' algorithms in plain loops, and when a selection agrees with them.

Nothing of the room's layers, batches, loop or selection is used here: a deep copy of the model, one
example at a time and without padding, torch's own optimisers, a full sort.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.func import functional_call

from gossamer.base.load import BaseFiles, load_model, load_tokenizer
from gossamer.store.delta import DeltaSet
from gossamer.training.data import read_examples
from gossamer.training.encode import Encoded, encode_examples

CLIP = 1.0
WARMUP = 0.05
Weights = dict[str, Tensor]


@dataclass(frozen=True, eq=False)
class Task:
    """A model and what it is trained on."""

    model: nn.Module
    examples: Sequence[Encoded]
    batch_size: int
    learning_rate: float
    seed: int = 0

    @classmethod
    def of(
        cls, base: BaseFiles, data: Path, batch_size: int, learning_rate: float, seed: int = 0
    ) -> Task:
        encoded = encode_examples(read_examples(data), load_tokenizer(base), 512)
        return cls(load_model(base), encoded.fitting, batch_size, learning_rate, seed)

    def batches(self, examples: Sequence[Encoded] | None = None) -> Iterator[list[Encoded]]:
        """Endlessly: each pass is a permutation of its own."""
        rows, epoch = self.examples if examples is None else examples, 0
        while True:
            generator = torch.Generator().manual_seed(self.seed + epoch)
            order = torch.randperm(len(rows), generator=generator).tolist()
            for begin in range(0, len(rows), self.batch_size):
                yield [rows[i] for i in order[begin : begin + self.batch_size]]
            epoch += 1

    def rate(self, step: int, steps: int) -> float:
        """Linear: up to the peak, never 0, and down again."""
        warm = round(WARMUP * steps)
        if step < warm:
            return self.learning_rate * (step + 1) / (warm + 1)
        return self.learning_rate * (steps - step) / (steps - warm)

    def weights(self, *layers: str) -> Weights:
        """The weights of the layers of these names, all linear ones when none is given."""
        names = [n for n, m in self.model.named_modules() if isinstance(m, nn.Linear)]
        chosen = [n for n in names if n != "lm_head" and (not layers or n.endswith(layers))]
        return {f"{n}.weight": self.model.get_parameter(f"{n}.weight") for n in chosen}


def mean_loss(model: nn.Module, rows: Sequence[Encoded], replaced: Weights | None = None) -> Tensor:
    """Over the trained tokens of all rows."""
    total, count = torch.zeros(()), 0
    for row in rows:
        ids = torch.from_numpy(row.ids)
        logits = functional_call(model, replaced or {}, kwargs={"input_ids": ids[None]}).logits[0]
        marked = torch.from_numpy(row.trained)[1:]
        total = total + F.cross_entropy(logits[:-1][marked], ids[1:][marked], reduction="sum")
        count += int(marked.sum())
    return total / count


def fine_tuned(
    task: Task, names: Sequence[str], steps: int, *, only: Mapping[str, Tensor] | None = None,
    start: Weights | None = None, optimizer: type[torch.optim.Optimizer] = torch.optim.RMSprop,
    examples: Sequence[Encoded] | None = None,
) -> Weights:  # fmt: skip
    """Full fine-tuning of some weights: w_F. With `only`, of those entries (w ← w - η ∇ ⊙ m).

    Args:
        only: by weight, a mask of what may change.
        start: weights that a copy of the model begins with instead of its own.
        optimizer: with torch's defaults.
        examples: to train on; the task's when not given.
    """
    model = copy.deepcopy(task.model)
    with torch.no_grad():
        for name, value in (start or {}).items():
            model.get_parameter(name).copy_(value)
    parameters = [model.get_parameter(name).requires_grad_() for name in names]
    moving = optimizer(parameters, lr=task.learning_rate)  # type: ignore[call-arg]
    for step, rows in enumerate(islice(task.batches(examples), steps)):
        moving.param_groups[0]["lr"] = task.rate(step, steps)
        moving.zero_grad()
        mean_loss(model, rows).backward()
        for name, parameter in zip(names, parameters, strict=True):
            if only is not None and parameter.grad is not None:
                parameter.grad *= only[name]
        nn.utils.clip_grad_norm_(parameters, CLIP)
        moving.step()
    return {name: model.get_parameter(name).detach() for name in names}


def changes(after: Weights, before: Weights) -> Weights:
    return {name: (after[name] - before[name]).abs() for name in after}


def masks_of(delta_set: DeltaSet, names: Sequence[str], shapes: Weights) -> Weights:
    """Where an adapter has entries."""
    found = {}
    for name in names:
        mask = np.zeros(shapes[name].shape, np.bool_)
        if name in delta_set.deltas:
            mask.reshape(-1)[delta_set.deltas[name].elements()[0]] = True
        found[name] = torch.from_numpy(mask)
    return found


def block_sums(scores: Tensor, side: int) -> Tensor:
    """Slice by slice."""
    rows, columns = scores.shape
    return torch.stack(
        [
            torch.stack([scores[i : i + side, j : j + side].sum() for j in range(0, columns, side)])
            for i in range(0, rows, side)
        ]
    )


def block_mask(mask: Tensor, side: int) -> Tensor:
    """Which tiles a mask fills.

    Raises:
        AssertionError: it fills one in part.
    """
    filled = block_sums(mask.float(), side)
    whole = block_sums(torch.ones_like(mask, dtype=torch.float32), side)
    assert torch.equal(filled * (filled - whole), torch.zeros_like(filled)), "a tile in part"
    return filled > 0


def assert_top_k(chosen: Weights, scores: Weights, k: int, *, tolerance: float = 2e-4) -> None:
    """The k largest scores, and exactly k.

    Two ways to add up the same gradient differ in the last bits, so entries whose score lies this
    close to the k-th may be on either side; everything else must be where a full sort puts it.
    """
    assert chosen.keys() == scores.keys()
    taken = torch.cat([chosen[name].reshape(-1) for name in chosen])
    ranked = torch.cat([scores[name].reshape(-1) for name in chosen])
    assert int(taken.sum()) == k
    threshold = float(ranked.sort(descending=True).values[k - 1])
    band = tolerance * abs(threshold)
    close = (ranked - threshold).abs() <= band
    assert int(close.sum()) <= max(8, 0.03 * k), "the comparison would prove nothing"
    wrong = (taken != (ranked >= threshold)) & ~close
    assert not wrong.any(), f"{int(wrong.sum())} of {k} are not among the largest"


def with_the_worst(chosen: Weights, scores: Weights) -> Weights:
    """The same selection, but for one entry that is exchanged for one with the smallest score."""
    name = next(name for name in chosen if chosen[name].any())
    wrong = {n: mask.clone() for n, mask in chosen.items()}
    flat, ranked = wrong[name].view(-1), scores[name].reshape(-1)
    best = int(ranked.masked_fill(~flat, -torch.inf).argmax())
    worst = int(ranked.masked_fill(flat, torch.inf).argmin())
    flat[best], flat[worst] = False, True
    return wrong


def masked_adamw(
    task: Task, masks: Weights, values: Weights, first: int, steps: int, whole: int
) -> Weights:
    """Train what a mask leaves, steps `first` … of a schedule of `whole`, on the batches of these
    steps; the values at the end."""
    trained = {name: value.clone().requires_grad_() for name, value in values.items()}
    moving = torch.optim.AdamW(trained.values(), weight_decay=0.0)
    for step, rows in enumerate(islice(task.batches(), first, first + steps)):
        moving.param_groups[0]["lr"] = task.rate(first + step, whole)
        moving.zero_grad()
        base = {name: task.model.get_parameter(name) for name in masks}
        replaced = {name: base[name] + trained[name] * masks[name] for name in masks}
        mean_loss(task.model, rows, replaced).backward()
        nn.utils.clip_grad_norm_(trained.values(), CLIP)
        moving.step()
    return {name: value.detach() * masks[name] for name, value in trained.items()}


def assert_values(delta_set: DeltaSet, expected: Weights, *, tolerance: float = 2e-3) -> None:
    """An adapter's differences, dense, within a share of the largest."""
    largest = max(float(value.abs().max()) for value in expected.values())
    for name, value in expected.items():
        found: NDArray[np.float32] = np.zeros(value.shape, np.float32)
        if name in delta_set.deltas:
            found = delta_set.deltas[name].dense()
        np.testing.assert_allclose(found, value.numpy(), rtol=0, atol=tolerance * largest)


Select = Callable[[int, Weights, Weights, Weights], Weights]


def algorithm_1(
    task: Task, names: Sequence[str], select: Select, selections: Sequence[int], steps: int,
    whole: int,
) -> tuple[Weights, Weights, Weights]:  # fmt: skip
    """MCS, the epoch in which masks are taken.

    Args:
        select: (which selection, Ŵ, its gradient, the masks before) → the masks.
        selections: after which steps, counted from 1.
        whole: steps of the learning rate's schedule.

    Returns:
        Ŵ, the masks, and the unmasked gradient of the last selection.
    """
    changed = {n: torch.zeros_like(task.model.get_parameter(n)).requires_grad_() for n in names}
    masks = {name: torch.ones_like(value, dtype=torch.bool) for name, value in changed.items()}
    base = {name: task.model.get_parameter(name) for name in names}
    moving = torch.optim.AdamW(changed.values(), weight_decay=0.0)
    gradients: Weights = {}
    for step, rows in enumerate(islice(task.batches(), steps), start=1):
        moving.param_groups[0]["lr"] = task.rate(step - 1, whole)
        moving.zero_grad()
        mean_loss(task.model, rows, {n: base[n] + changed[n] * masks[n] for n in names}).backward()
        nn.utils.clip_grad_norm_(changed.values(), CLIP)
        moving.step()
        if step in selections:
            moving.zero_grad()
            mean_loss(task.model, rows, {n: base[n] + changed[n] for n in names}).backward()
            gradients = {
                n: value.grad.clone() for n, value in changed.items() if value.grad is not None
            }
            now = {n: value.detach().clone() for n, value in changed.items()}
            masks = select(list(selections).index(step), now, gradients, masks)
    return {n: value.detach() for n, value in changed.items()}, masks, gradients
