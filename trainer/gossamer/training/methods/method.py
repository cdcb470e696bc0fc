"""What a training method is."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Generic, Literal, TypeVar

from gossamer.jobs.methods import Declaration, MethodParameters

if TYPE_CHECKING:
    from gossamer.training.sparse import Entries
    from gossamer.training.work import Work


@dataclass(frozen=True)
class Density:
    """How many values are trained, and of how many: both denominators, always.

    Attributes:
        nnz: trained values: a sparse method has one at each of its positions, LoRA those of its
            factors.
        targets: elements of the weights that they change.
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
class Trained:
    """What a method made.

    Attributes:
        entries: base weight name → what was trained.
        density: what that amounts to.
        block_size: side of the tiles that the entries fill, if they do; else 1.
        fixed: entries that were there from the beginning and belong to the adapter; none of them
            is among `entries`.
        seeds: base weight name → the seed that its positions come from
            (`gossamer.store.format.seeded_positions`); a weight that has one is stored without its
            positions.
        notes: what the record says beyond parameters and losses; JSON values.
    """

    entries: Mapping[str, Entries]
    density: Density
    block_size: int = 1
    fixed: Mapping[str, Entries] = field(default_factory=dict)
    seeds: Mapping[str, int] = field(default_factory=dict)
    notes: Mapping[str, Any] = field(default_factory=dict)


P = TypeVar("P", bound=MethodParameters)


@dataclass(frozen=True)
class Method(Generic[P]):
    """A row of the registry.

    Attributes:
        declaration: its name, paper and parameters.
        train: (parameters, work) → what it made.
        learning_rate: the default peak for a density.
        optimizer: the default.
    """

    declaration: Declaration
    train: Callable[[P, Work], Trained]
    learning_rate: Callable[[Density], float]
    optimizer: Literal["adamw", "rmsprop"] = "adamw"
