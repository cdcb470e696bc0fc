"""What a training method is."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Generic, TypeVar

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict


class MethodParameters(BaseModel):
    """What a method declares that can be set; every field has a default and a description."""

    model_config = ConfigDict(frozen=True, extra="forbid")


@dataclass(frozen=True)
class Density:
    """How many positions are trained, and of how many: both denominators, always.

    Attributes:
        nnz: trained positions.
        targets: elements of the weights that the positions lie in.
        model: elements of all weights of the model that an adapter may change.
    """

    nnz: int
    targets: int
    model: int

    @property
    def of_targets(self) -> float:
        """nnz / elements of the target weights."""
        return self.nnz / self.targets

    @property
    def of_model(self) -> float:
        """nnz / elements of all linear weights of the model."""
        return self.nnz / self.model


@dataclass(frozen=True, eq=False)
class Selection:
    """The positions that a run trains.

    Attributes:
        positions: base weight name → its row-major positions, int64, strictly increasing.
        density: what they amount to.
        seeds: base weight name → the seed that its positions come from
            (`gossamer.store.format.seeded_positions`); a weight that has one is stored without its
            positions.
    """

    positions: Mapping[str, NDArray[np.int64]]
    density: Density
    seeds: Mapping[str, int] = field(default_factory=dict)


P = TypeVar("P", bound=MethodParameters)


@dataclass(frozen=True)
class Method(Generic[P]):
    """A row of the registry.

    Attributes:
        name: what it is called on the command line and in the training record.
        summary: one line for people.
        paper: where it comes from.
        parameters: what it declares.
        select: (parameters, table, seed) → the positions to train. `table` is base weight name →
            (out_features, in_features) of every weight that an adapter may change; `seed` is the
            run's.
        learning_rate: the default for a density.
    """

    name: str
    summary: str
    paper: str
    parameters: type[P]
    select: Callable[[P, Mapping[str, tuple[int, int]], int], Selection]
    learning_rate: Callable[[Density], float]
