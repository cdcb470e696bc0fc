"""LoTA: find the entries that a full fine-tuning changes most, reset, and train only those.

Panda, Isik, Qi, Koyejo, Weissman, Mittal, "Lottery Ticket Adaptation: Mitigating Destructive
Interference in LLMs" (2024), algorithm 1. Exactly the wanted number of entries is chosen, whatever
the calibration changed; the paper's code takes a threshold, which is 0 when too few entries moved
and then keeps everything.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from gossamer.jobs.methods import DECLARATIONS, LotaParameters
from gossamer.store.format import digest
from gossamer.training.checkpoints import Result
from gossamer.training.errors import AdapterError, DensityError
from gossamer.training.methods.method import Density, Method, Trained
from gossamer.training.methods.recycling import Beginning, beginning, inherits, train_inherited
from gossamer.training.methods.sparta import random_positions, shares
from gossamer.training.order import updates
from gossamer.training.selecting import largest, tile_entries, tile_sums
from gossamer.training.starting import entries_of

if TYPE_CHECKING:
    from gossamer.training.dense import DenseLinear
    from gossamer.training.work import Work

Shapes = Mapping[str, tuple[int, int]]
#: by weight, bool [out, in]
Masks = Mapping[str, Tensor]


def train(parameters: LotaParameters, work: Work) -> Trained:
    """Calibrate, extract, reset, train.

    Raises:
        DensityError: the sparsity leaves nothing to train.
        UnknownTargetError: the targets name no weights.
        ConfigError: likewise.
        AdapterError: an adapter that is referred to cannot be used.
    """
    if inherits(parameters):
        return train_inherited(parameters, work)
    return train_among(parameters, work, beginning(parameters, work), {})


def train_among(
    parameters: LotaParameters, work: Work, begin: Beginning, allowed: Masks
) -> Trained:
    """LoTA on the entries that are allowed; `begin` is kept where it is not trained."""
    chosen = work.targets(parameters.targets)
    calibrated = parameters.mask == "calibrated" and parameters.mask_from is None
    planned = {"train": work.steps}
    if calibrated:
        steps, iterations = calibration_steps(parameters, work), range(parameters.iterations)
        planned = {f"calibrate-{i + 1}": steps for i in iterations} | planned
    counts: list[int] = []
    if parameters.mask_from is not None:
        positions, notes = _borrowed(parameters.mask_from, work, chosen, allowed)
        nnz = sum(where.numel() for where in positions.values())
        density = work.density(nnz, {name: work.table[name] for name in positions})
    else:
        counts = _counts(parameters, chosen, allowed)
        density = work.density(_entries_at_most(counts, parameters, chosen), chosen)
        positions, notes = {}, {}
    work.begin(density, planned, len(chosen))
    if parameters.mask_from is None:
        positions, notes = _extracted(parameters, work, begin, chosen, allowed, counts)
        nnz = sum(where.numel() for where in positions.values())
        density = work.density(nnz, {name: chosen[name] for name in positions})
    fixed = begin.fixed(positions)
    entries = work.sparse("train", positions, start=begin.values(positions), fixed=fixed)
    whole = 1 if parameters.mask_from is not None or fixed else parameters.block_size
    return Trained(entries, density, whole, fixed, notes={**begin.notes, **notes})


def calibration_steps(parameters: LotaParameters, work: Work) -> int:
    """Updates of one calibration: passes over the calibration's share of the examples."""
    if parameters.calibration_steps is not None:
        return parameters.calibration_steps
    examples = len(work.some_examples(parameters.calibration_fraction))
    return updates(work.config, examples, parameters.calibration_epochs)


def _units(shape: tuple[int, int], side: int) -> int:
    """Entries, or tiles, of a weight."""
    return math.ceil(shape[0] / side) * math.ceil(shape[1] / side)


def _counts(parameters: LotaParameters, chosen: Shapes, allowed: Masks) -> list[int]:
    """How many entries or tiles each iteration keeps, of all weights together.

    The sparsity s is reached in equal factors: after i of n iterations (1 - s)^(i/n) are left, as
    in the paper's 90 % → 99 %.
    """
    side, density = parameters.block_size, 1.0 - parameters.sparsity
    total = sum(_units(shape, side) for shape in chosen.values())
    free = sum(
        _free(allowed[name], side) if name in allowed else _units(shape, side)
        for name, shape in chosen.items()
    )
    n = parameters.iterations
    counts = [round(density ** (i / n) * total) for i in range(1, n + 1)]
    if counts[-1] < 1 or counts[-1] > free:
        units = "positions" if side == 1 else f"tiles of {side} x {side}"
        raise DensityError(
            "sparsity", parameters.sparsity, wanted=counts[-1], available=free, units=units,
            smallest=1.0 - free / total, largest=1.0 - 1.0 / total,
            where="what the parents leave of the targets" if allowed else "the targets",
        )  # fmt: skip
    return [min(count, free) for count in counts]


def _free(allowed: Tensor, side: int) -> int:
    """Entries that are allowed; of tiles, those that are allowed whole."""
    return int(_whole_tiles(allowed, side).sum()) if side > 1 else int(allowed.sum())


def _whole_tiles(allowed: Tensor, side: int) -> Tensor:
    return tile_sums((~allowed).float(), side) == 0


def _entries_at_most(counts: list[int], parameters: LotaParameters, chosen: Shapes) -> int:
    side = parameters.block_size
    return min(counts[-1] * side * side, sum(map(math.prod, chosen.values())))


def _borrowed(
    reference: str, work: Work, chosen: Shapes, allowed: Masks
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The positions of another adapter in the targets, but for those that may not be trained."""
    found = work.open(reference, "mask_from")
    positions: dict[str, Tensor] = {}
    for name, part in entries_of(found).items():
        where = part.positions
        if name in allowed:
            where = where[allowed[name].reshape(-1)[where]]
        if name in chosen and where.numel():
            positions[name] = where
    if not positions:
        problem = "none of its entries may be trained here"
        error = AdapterError(reference, problem, "Give another mask, or more targets")
        error.named_by("mask_from")
        raise error
    return positions, {"mask_from": {"digest": digest(found), "nnz": found.nnz}}


def _extracted(
    parameters: LotaParameters, work: Work, begin: Beginning, chosen: Shapes, allowed: Masks,
    counts: list[int],
) -> tuple[dict[str, Tensor], dict[str, Any]]:  # fmt: skip
    """The positions to train: of the largest |Δ|, or drawn at random as a control."""
    side = parameters.block_size
    if parameters.mask == "random":
        sizes = {
            name: _free(allowed[name], side) if name in allowed else _units(shape, side)
            for name, shape in chosen.items()
        }
        drawn = random_positions(sizes, counts[-1], work.config.seed)
        units = {
            name: _nth_allowed(torch.from_numpy(where), allowed.get(name), side)
            for name, where in drawn.items()
        }
        return _as_entries(units, chosen, side), {}
    mask: Masks = allowed
    found: dict[str, Tensor] = {}
    notes: dict[str, Any] = {}
    for i, count in enumerate(counts):
        result = work.dense(
            f"calibrate-{i + 1}",
            list(chosen),
            _Extraction(parameters, mask, count),
            start=begin.entries,
            allowed=mask,
            examples=work.some_examples(parameters.calibration_fraction),
        )
        found = dict(result.tensors)
        notes = {"extraction": result.notes}
        entries = _as_entries(found, chosen, side)
        mask = {name: _mask_of(entries.get(name), shape) for name, shape in chosen.items()}
    return _as_entries(found, chosen, side), notes


class _Extraction:
    """Trained layers → the entries or tiles of the largest |Δ|, by weight."""

    def __init__(self, parameters: LotaParameters, allowed: Masks, count: int) -> None:
        self._parameters = parameters
        self._allowed = allowed
        self._count = count

    @torch.no_grad()
    def __call__(self, layers: Mapping[str, DenseLinear]) -> Result:
        side = self._parameters.block_size
        # Ŵ is Δ = w_F - w_P itself
        scores = {name: layer.values.detach().abs() for name, layer in layers.items()}
        still = 0
        for name, score in scores.items():
            unchanged = score == 0
            if name in self._allowed:
                unchanged &= self._allowed[name].to(unchanged.device)
            still += int(unchanged.sum())
        if side > 1:
            scores = {name: tile_sums(score, side) for name, score in scores.items()}
        allowed = {
            name: _whole_tiles(mask, side) if side > 1 else mask
            for name, mask in self._allowed.items()
        }
        if self._parameters.scope == "global":
            found = largest(scores, self._count, allowed)
            return Result(_on_host(found.positions), {"unchanged": still, "tied": found.tied})
        sizes = {
            name: int(allowed[name].sum()) if name in allowed else score.numel()
            for name, score in scores.items()
        }
        positions: dict[str, Tensor] = {}
        tied = 0
        for name, share in shares(sizes, self._count).items():
            if share:
                one = largest({name: scores[name]}, share, allowed)
                positions |= one.positions
                tied += one.tied
        return Result(_on_host(positions), {"unchanged": still, "tied": tied})


def _on_host(positions: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: where.cpu() for name, where in positions.items()}


def _nth_allowed(places: Tensor, allowed: Tensor | None, side: int) -> Tensor:
    """Numbers among the allowed entries or tiles → among all of them."""
    if allowed is None:
        return places
    units = _whole_tiles(allowed, side) if side > 1 else allowed
    return units.reshape(-1).nonzero().reshape(-1)[places]


def _as_entries(units: Mapping[str, Tensor], chosen: Shapes, side: int) -> dict[str, Tensor]:
    if side == 1:
        return dict(units)
    return {name: tile_entries(tiles, chosen[name], side) for name, tiles in units.items()}


def _mask_of(positions: Tensor | None, shape: tuple[int, int]) -> Tensor:
    mask = torch.zeros(shape[0] * shape[1], dtype=torch.bool)
    if positions is not None:
        mask[positions] = True
    return mask.view(shape)


def learning_rate(density: Density) -> float:
    """The default of calibration and training alike: full fine-tuning's, as in the paper.

    AdamW, where the paper has RMSProp: of a few hundred updates or less, RMSProp's first ones are
    up to ten times as large as the later ones (docs/decisions/training-jobs.md).
    """
    return min(1e-3, max(1e-6, 3e-4 * math.sqrt(1.35e8 / density.model)))


LOTA = Method(DECLARATIONS["lota"], train, learning_rate)
