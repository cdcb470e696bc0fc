"""MCS: train a dense difference under a mask of its most connected entries, then only those.

Arnob, Su, Kim, Ostapenko, Precup, Page-Caccia, Sordoni, "Exploring Sparse Adapters for Scalable
Merging of Parameter Efficient Experts" (2025), algorithm 1. Scores are taken on the examples of a
step, after it, with the whole difference Ŵ in the model. While Ŵ = 0 every score is 0, so a few
steps with the whole Ŵ come first. Ŵ is dense until its last selection, and O(nnz) afterwards. No
bias is trained; the paper's code trains one.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from gossamer.jobs.methods import DECLARATIONS, McsParameters
from gossamer.training.checkpoints import Result
from gossamer.training.errors import DensityError, NotSelectedError
from gossamer.training.methods.method import Density, Method, Trained
from gossamer.training.methods.recycling import beginning, inherits, train_inherited
from gossamer.training.selecting import largest, tile_entries, tile_sums
from gossamer.training.sparse import Entries

if TYPE_CHECKING:
    from gossamer.training.dense import DenseLinear
    from gossamer.training.work import Work

#: Of a mask, replaced at each selection by `grow_drop` (Ansell et al., 2024, anneal theirs).
REPLACED = 0.2


def train(parameters: McsParameters, work: Work) -> Trained:
    """Select during the first epoch, then train what was selected.

    Raises:
        DensityError: the keep-ratio keeps nothing.
        NotSelectedError: there are too few steps for a first selection.
        UnknownTargetError, ConfigError: the targets name no weights.
        AdapterError: `init_from` cannot be used.
    """
    if inherits(parameters):
        return train_inherited(parameters, work)
    chosen = work.targets(parameters.targets)
    warmup = parameters.warmup_steps
    if warmup is None:
        warmup = min(100, math.ceil(0.1 * work.epoch))
    selecting = min(work.steps, max(warmup, round(parameters.selection_epochs * work.epoch)))
    if selecting < warmup:
        raise NotSelectedError(work.steps, warmup)
    begin = beginning(parameters, work)
    selection = _Selection(parameters, chosen, max(1, warmup))
    phases = {"select": selecting}
    if work.steps > selecting:
        phases["train"] = work.steps - selecting
    work.begin(work.density(selection.nnz, chosen), phases, len(chosen))
    found = work.dense(
        "select", list(chosen), selection.result, start=begin.entries, after_step=selection.after,
        one_schedule=True,
    )  # fmt: skip
    positions = {n.removeprefix("at:"): t for n, t in found.tensors.items() if n.startswith("at:")}
    values = {name: found.tensors[f"of:{name}"] for name in positions}
    fixed = begin.fixed(positions)
    if "train" in phases:
        entries = work.sparse("train", positions, start=values, fixed=fixed, one_schedule=True)
    else:
        entries = {name: Entries(positions[name], values[name]) for name in positions}
    nnz = sum(where.numel() for where in positions.values())
    density = work.density(nnz, {name: chosen[name] for name in positions})
    selections = 1 + selecting // parameters.period - max(1, warmup) // parameters.period
    notes: dict[str, Any] = {**begin.notes, "selection": {"times": selections, **found.notes}}
    block_size = 1 if fixed else parameters.block_size
    return Trained(entries, density, block_size, fixed, notes=notes)


class _Selection:
    """Sets the masks of the layers, on the way through the first epoch."""

    def __init__(
        self, parameters: McsParameters, chosen: Mapping[str, tuple[int, int]], warmup: int
    ) -> None:
        self._parameters = parameters
        self._chosen = chosen
        self._warmup = warmup
        side = parameters.block_size
        # N_B = kr · d1 · d2 / B² (eq. 3); B = 1: k = kr · d1 · d2
        self._kept = {
            name: round(parameters.keep_ratio * rows * columns / (side * side))
            for name, (rows, columns) in chosen.items()
        }
        if not all(self._kept.values()):
            smallest = min(self._kept, key=lambda name: self._kept[name])
            size = math.prod(chosen[smallest])
            least = 0.51 * side * side / size
            raise DensityError(
                "keep_ratio", parameters.keep_ratio, wanted=0, available=size, smallest=least,
                largest=1.0, where=smallest,
            )  # fmt: skip

    @property
    def nnz(self) -> int:
        """Entries of the masks, at most."""
        side = self._parameters.block_size
        return sum(
            min(kept * side * side, math.prod(self._chosen[name]))
            for name, kept in self._kept.items()
        )

    def after(
        self, step: int, layers: Mapping[str, DenseLinear],
        gradient: Callable[[], Mapping[str, Tensor]],
    ) -> None:  # fmt: skip
        """Select after the warm-up, and at every multiple of the period behind it."""
        again = step > self._warmup and step % self._parameters.period == 0
        if step == self._warmup or again:
            self._select(layers, gradient())

    @torch.no_grad()
    def _select(self, layers: Mapping[str, DenseLinear], gradients: Mapping[str, Tensor]) -> None:
        side = self._parameters.block_size
        scores = {n: self._units(self._score(layers[n], gradients[n])) for n in layers}
        alive = set(scores)
        if self._parameters.layer_drop:
            # Eq. 5 and 6: a layer wholly below the threshold over all layers is left out.
            alive = set(largest(scores, sum(self._kept.values())).positions)
        if self._parameters.score == "grow_drop":
            scores = {n: self._replaced(layers[n], score) for n, score in scores.items()}
        for name, layer in layers.items():
            mask = torch.zeros_like(layer.values, dtype=torch.bool)
            if name in alive:
                units = largest({name: scores[name]}, self._kept[name]).positions[name]
                where = tile_entries(units, self._chosen[name], side) if side > 1 else units
                mask.view(-1)[where] = True
            layer.mask = mask
            layer.anchor = None
            if self._parameters.score == "grow_drop":
                layer.anchor = layer.values.detach().clone()

    def _units(self, scores: Tensor) -> Tensor:
        """Of entries → of entries or tiles."""
        side = self._parameters.block_size
        return scores if side == 1 else tile_sums(scores, side)

    def _score(self, layer: DenseLinear, gradient: Tensor) -> Tensor:
        values, score = layer.values.detach(), self._parameters.score
        if score in ("gradient", "grow_drop"):
            return gradient.abs()
        if score == "magnitude":
            return values.abs()
        product = values * gradient
        if score == "snip" or self._parameters.sign == "abs":
            return product.abs()
        return product if self._parameters.sign == "+" else -product

    def _replaced(self, layer: DenseLinear, gradient: Tensor) -> Tensor:
        """Of the mask, what has changed most since the last selection stays; the rest is what has
        the largest gradient elsewhere."""
        if layer.mask is None or layer.anchor is None or not layer.mask.any():
            return gradient
        changed = self._units((layer.values.detach() - layer.anchor).abs())
        mask = self._units(layer.mask.float()) > 0
        stays = round((1.0 - REPLACED) * int(mask.sum()))
        kept = largest({"": changed}, max(1, stays), {"": mask}).positions[""]
        # Those that stay in front of all others, and those that go behind them.
        score = gradient.masked_fill(mask, -torch.inf)
        score.view(-1)[kept] = torch.inf
        return score

    def result(self, layers: Mapping[str, DenseLinear]) -> Result:
        """Where the masks are, and Ŵ there."""
        tensors = {}
        for name, layer in layers.items():
            where = _positions_of(layer)
            if where.numel():
                tensors[f"at:{name}"] = where.cpu()
                values = layer.difference().reshape(-1)[where]
                tensors[f"of:{name}"] = values.to("cpu", torch.float32)
        dropped = [name for name in layers if f"at:{name}" not in tensors]
        return Result(tensors, {"dropped_weights": dropped})


def _positions_of(layer: DenseLinear) -> Tensor:
    mask = layer.mask
    if mask is None:
        raise NotSelectedError(0, 1)
    return mask.reshape(-1).nonzero().reshape(-1)


def learning_rate(density: Density) -> float:
    """The paper's 1e-4 for a model of 3.8 B, rising to what serves one of 135 M best."""
    return min(3e-3, max(1e-5, 1e-4 * math.pow(3.8e9 / density.model, 0.8)))


MCS = Method(DECLARATIONS["mcs"], train, learning_rate)
