"""Full fine-tuning of the targets: the baseline that the sparse methods are compared with."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch

from gossamer.jobs.methods import DECLARATIONS, FullParameters
from gossamer.training.checkpoints import Result
from gossamer.training.methods.lota import learning_rate
from gossamer.training.methods.method import Method, Trained
from gossamer.training.methods.recycling import beginning
from gossamer.training.sparse import Entries

if TYPE_CHECKING:
    from gossamer.training.dense import DenseLinear
    from gossamer.training.work import Work


def train(parameters: FullParameters, work: Work) -> Trained:
    """Train every entry of the targets.

    Raises:
        UnknownTargetError, ConfigError: the targets name no weights.
        AdapterError: `init_from` cannot be used.
    """
    chosen = work.targets(parameters.targets)
    begin = beginning(parameters, work)
    density = work.density(sum(map(math.prod, chosen.values())), chosen)
    work.begin(density, {"train": work.steps}, len(chosen))
    found = work.dense("train", list(chosen), _differences, start=begin.entries)
    entries = {
        name: Entries(torch.arange(values.numel()), values)
        for name, values in found.tensors.items()
    }
    outside = {name: part.positions for name, part in begin.entries.items() if name in chosen}
    return Trained(entries, density, fixed=begin.fixed(outside), notes=begin.notes)


def _differences(layers: Mapping[str, DenseLinear]) -> Result:
    kept = {name: layer.difference().reshape(-1) for name, layer in layers.items()}
    return Result({name: values.to("cpu", torch.float32) for name, values in kept.items()}, {})


FULL = Method(DECLARATIONS["full"], train, learning_rate)
