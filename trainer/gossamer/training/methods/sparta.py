"""SpaRTA: train a random sparse set of parameters.

Rios, Dognin, Luss, Ramamurthy, "Sparsity May Be All You Need: Sparse Random Parameter Adaptation"
(2025). The paper draws each parameter independently with probability k; here exactly the wanted
number is drawn without replacement, by integer arithmetic from a seed, so that the same seed gives
the same positions on every machine and a file need not store them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray

from gossamer.jobs.methods import DECLARATIONS, SpartaParameters
from gossamer.store.format.seeded import seeded_positions
from gossamer.training.errors import DensityError
from gossamer.training.methods.method import Density, Method, Trained
from gossamer.training.methods.recycling import beginning, inherits, train_inherited
from gossamer.training.methods.targets import match_targets

if TYPE_CHECKING:
    from gossamer.training.work import Work


def shares(sizes: Mapping[str, int], wanted: int) -> dict[str, int]:
    """How many positions each weight gets: in proportion to its size, `wanted` in all.

    In whole numbers, so that the shares add up exactly on every machine.
    """
    total, before, found = sum(sizes.values()), 0, {}
    for name, size in sizes.items():
        found[name] = wanted * (before + size) // total - wanted * before // total
        before += size
    return found


def random_positions(
    sizes: Mapping[str, int], wanted: int, seed: int
) -> dict[str, NDArray[np.int64]]:
    """Positions drawn from the seed, spread over the weights in proportion to their sizes."""
    return {
        name: seeded_positions(seed, name, sizes[name], share)
        for name, share in shares(sizes, wanted).items()
        if share
    }


@dataclass(frozen=True, eq=False)
class Drawn:
    """Positions of a run, what they amount to, and the seed that they come from."""

    positions: Mapping[str, NDArray[np.int64]]
    density: Density
    seed: int


def draw(parameters: SpartaParameters, table: Mapping[str, tuple[int, int]], seed: int) -> Drawn:
    """Exactly the wanted number of positions, from the seed.

    Args:
        parameters: what is wanted.
        table: base weight name → (out_features, in_features) of all that an adapter may change.
        seed: of the run.

    Raises:
        DensityError: the targets have fewer elements than the density asks for, or it asks for
            none.
        UnknownTargetError, ConfigError: the targets name no weights.
    """
    sizes = {n: math.prod(s) for n, s in match_targets(parameters.targets, table).items()}
    in_targets, in_model = sum(sizes.values()), sum(map(math.prod, table.values()))
    denominator = in_model if parameters.of == "model" else in_targets
    wanted = round(Fraction(parameters.density) * denominator)
    if not 0 < wanted <= in_targets:
        largest = in_targets / denominator
        raise DensityError(
            "density", parameters.density, wanted=wanted, available=in_targets,
            smallest=1 / denominator, largest=largest,
        )  # fmt: skip
    mask_seed = seed if parameters.mask_seed is None else parameters.mask_seed
    positions = random_positions(sizes, wanted, mask_seed)
    density = Density(wanted, sum(sizes[name] for name in positions), in_model)
    return Drawn(positions, density, mask_seed)


def train(parameters: SpartaParameters, work: Work) -> Trained:
    """Draw the positions, train their values.

    Raises:
        AdapterError: `init_from` cannot be used.
        DensityError, UnknownTargetError, ConfigError: see `draw`.
    """
    if inherits(parameters):
        return train_inherited(parameters, work)
    work.targets(parameters.targets)  # says more of those that match nothing than `draw` can
    drawn = draw(parameters, work.table, work.config.seed)
    positions = {name: torch.from_numpy(where) for name, where in drawn.positions.items()}
    begin = beginning(parameters, work)
    work.begin(drawn.density, {"train": work.steps}, len(positions))
    fixed = begin.fixed(positions)
    entries = work.sparse("train", positions, start=begin.values(positions), fixed=fixed)
    # A weight that has more entries than those that were drawn cannot be stored by its seed.
    seeds = {name: drawn.seed for name in positions if name not in fixed}
    return Trained(entries, drawn.density, fixed=fixed, seeds=seeds, notes=begin.notes)


def learning_rate(density: Density) -> float:
    """A default that falls with the density and with the size of the model.

    The paper's best rates (its Tables 14 and 15) grow as the density falls and are lower for 7B
    than for 2B models: 2e-4 to 1e-3 at 0.5 % of 2B, 5e-5 to 5e-4 of 7B. This gives 7e-4 and 4e-4
    there, and 3e-3 at 0.5 % of a model of 135 M, where 2e-3 to 4e-3 was best on short tasks.
    """
    rate = 1e-3 * math.sqrt(0.005 / density.of_model) * math.sqrt(1e9 / density.model)
    return min(5e-3, max(1e-5, rate))


SPARTA = Method(DECLARATIONS["sparta"], train, learning_rate)
