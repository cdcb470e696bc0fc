"""LoRA: a low-rank product beside each target, the baseline that adapters are compared with.

Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models" (2021), by PEFT's own layers in this
trainer's loop: the same order of the data, optimiser, schedule, clipping and evaluation as the
sparse methods have. What comes out is the product, a dense difference in each target.
"""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Iterable, Mapping
from functools import partial
from importlib.metadata import version
from typing import TYPE_CHECKING

import torch

from gossamer.jobs.methods import DECLARATIONS, LoraParameters
from gossamer.training.checkpoints import Result
from gossamer.training.errors import MissingPackageError
from gossamer.training.methods.method import Density, Method, Trained
from gossamer.training.methods.recycling import beginning
from gossamer.training.sparse import Entries

if TYPE_CHECKING:
    from torch import nn

    from gossamer.training.low_rank import LowRankLinear
    from gossamer.training.starting import Weights
    from gossamer.training.work import Make, Work


def train(parameters: LoraParameters, work: Work) -> Trained:
    """Train both factors of every target.

    Raises:
        MissingPackageError: PEFT is not installed.
        UnknownTargetError, ConfigError: the targets name no weights.
        AdapterError: `init_from` cannot be used.
    """
    if importlib.util.find_spec("peft") is None:
        raise MissingPackageError("peft", "lora")
    chosen = work.targets(parameters.targets)
    rank, alpha = parameters.rank, parameters.alpha
    begin = beginning(parameters, work)
    density = work.density(rank * sum(map(sum, chosen.values())), chosen)
    work.begin(density, {"train": work.steps}, len(chosen))
    made = _layers(parameters, chosen, work, begin.entries)
    found = work.layered("train", made, _differences, start=begin.entries)
    entries = {
        name: Entries(torch.arange(values.numel()), values)
        for name, values in found.tensors.items()
    }
    outside = {name: part.positions for name, part in begin.entries.items() if name in chosen}
    low_rank = {"rank": rank, "alpha": alpha, "values": density.nnz, "peft": version("peft")}
    notes = {**begin.notes, "low_rank": low_rank}
    return Trained(entries, density, fixed=begin.fixed(outside), notes=notes)


def _layers(
    parameters: LoraParameters, chosen: Iterable[str], work: Work, start: Weights
) -> dict[str, Make]:
    """By weight, what makes the layer in the place of its own. The factors are drawn from the run's
    seed, one layer after the other."""
    from gossamer.training.low_rank import LowRankLinear  # PEFT is an extra

    generator = torch.Generator().manual_seed(work.config.seed)

    def layer(linear: nn.Linear, begin: Entries | None) -> LowRankLinear:
        return LowRankLinear(
            linear, rank=parameters.rank, alpha=parameters.alpha, generator=generator,
            start=begin, written=work.exact,
        )  # fmt: skip

    return {name: partial(layer, begin=start.get(name)) for name in chosen}


def _differences(layers: Mapping[str, LowRankLinear]) -> Result:
    kept = {name: layer.difference().reshape(-1) for name, layer in layers.items()}
    return Result({name: values.to("cpu", torch.float32) for name, values in kept.items()}, {})


def learning_rate(density: Density) -> float:
    """2e-4 for a model of 7 B, rising as models get smaller.

    2e-4 is what Dettmers et al., "QLoRA: Efficient Finetuning of Quantized LLMs" (2023), train LoRA
    with on models of 7 B and 13 B; on larger ones it is 1e-4. This gives 1e-4 at 28 B and 1.4e-3 at
    135 M.
    """
    return min(3e-3, max(1e-5, 2e-4 * math.sqrt(7e9 / density.model)))


LORA = Method(DECLARATIONS["lora"], train, learning_rate)
