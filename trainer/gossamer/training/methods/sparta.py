"""SpaRTA: train a random sparse set of parameters.

Rios, Dognin, Luss, Ramamurthy, "Sparsity May Be All You Need: Sparse Random Parameter Adaptation"
(2025). The paper draws each parameter independently with probability k; here exactly the wanted
number is drawn without replacement, by integer arithmetic from a seed, so that the same seed gives
the same positions on every machine and a file need not store them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from fractions import Fraction
from typing import Literal

from pydantic import Field

from gossamer.store.format.seeded import seeded_positions
from gossamer.training.errors import DensityError
from gossamer.training.methods.method import Density, Method, MethodParameters, Selection
from gossamer.training.methods.targets import match_targets


class SpartaParameters(MethodParameters):
    """What can be set for SpaRTA."""

    density: float = Field(
        default=0.005, gt=0.0, le=1.0, description="Share of the parameters that is trained."
    )
    of: Literal["model", "targets"] = Field(
        default="model",
        description="What the density is a share of: all linear weights of the model, or the "
        "targets alone.",
    )
    targets: str = Field(
        default="v,o",
        description="Weights to train: q, k, v, o, gate, up, down or names of layers, separated "
        "by commas; all-linear; or re:<pattern>. The paper's best are v and o.",
    )
    mask_seed: int | None = Field(
        default=None,
        ge=0,
        lt=2**63,
        description="Seed of the positions; the seed of the run when it is not given.",
    )


def select(
    parameters: SpartaParameters, table: Mapping[str, tuple[int, int]], seed: int
) -> Selection:
    """Positions drawn from the seed, spread over the targets in proportion to their sizes.

    Raises:
        DensityError: the targets have fewer elements than the density asks for, or it asks for
            none.
        UnknownTargetError, ConfigError: the targets name no weights.
    """
    chosen = match_targets(parameters.targets, table)
    sizes = {name: math.prod(shape) for name, shape in chosen.items()}
    in_targets, in_model = sum(sizes.values()), sum(math.prod(shape) for shape in table.values())
    denominator = in_model if parameters.of == "model" else in_targets
    wanted = round(Fraction(parameters.density) * denominator)
    if not 0 < wanted <= in_targets:
        largest = in_targets / denominator
        raise DensityError(wanted, in_targets, parameters.density, largest)
    mask_seed = seed if parameters.mask_seed is None else parameters.mask_seed
    positions = {}
    before = 0
    for name, size in sizes.items():
        # In whole numbers, so that the shares add up to exactly `wanted` on every machine.
        share = wanted * (before + size) // in_targets - wanted * before // in_targets
        before += size
        if share:
            positions[name] = seeded_positions(mask_seed, name, size, share)
    touched = sum(sizes[name] for name in positions)
    return Selection(
        positions=positions,
        density=Density(nnz=wanted, targets=touched, model=in_model),
        seeds=dict.fromkeys(positions, mask_seed),
    )


def learning_rate(density: Density) -> float:
    """A default that falls with the density and with the size of the model.

    The paper's best rates (its Tables 14 and 15) grow as the density falls and are lower for 7B
    than for 2B models: 2e-4 to 1e-3 at 0.5 % of 2B, 5e-5 to 5e-4 of 7B. This gives 7e-4 and 4e-4
    there, and 3e-3 at 0.5 % of a model of 135 M, where 2e-3 to 4e-3 was best on short tasks.
    """
    rate = 1e-3 * math.sqrt(0.005 / density.of_model) * math.sqrt(1e9 / density.model)
    return min(5e-3, max(1e-5, rate))


SPARTA = Method(
    name="sparta",
    summary="Train a random sparse set of parameters; its positions come from a seed.",
    paper="https://arxiv.org/abs/2502.15975",
    parameters=SpartaParameters,
    select=select,
    learning_rate=learning_rate,
)
