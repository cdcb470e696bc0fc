"""Beginning with an adapter or a mix instead of nothing (MCS, appendix B, "recycling")."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from gossamer.store.format import digest
from gossamer.training.errors import AdapterError
from gossamer.training.methods.method import Trained
from gossamer.training.starting import Weights, at, entries_of, without

if TYPE_CHECKING:
    from torch import Tensor

    from gossamer.jobs.methods import MethodParameters
    from gossamer.training.work import Work


@dataclass(frozen=True, eq=False)
class Beginning:
    """What a run begins with.

    Attributes:
        entries: by weight; none for a run that begins with the base.
        notes: for the record.
    """

    entries: Weights = field(default_factory=dict)
    notes: Mapping[str, Any] = field(default_factory=dict)

    def values(self, positions: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """What the values at the trained positions begin with."""
        return {name: at(self.entries, name, where) for name, where in positions.items()}

    def fixed(self, positions: Mapping[str, Tensor]) -> Weights:
        """What lies elsewhere: the model keeps it, and so does the adapter."""
        return without(self.entries, positions)


def beginning(parameters: MethodParameters, work: Work) -> Beginning:
    """As `init_from` says.

    Raises:
        AdapterError: there is none, or it is for another base.
    """
    if parameters.init_from is None:
        return Beginning()
    found = work.open(parameters.init_from, "init_from")
    notes = {"init_from": {"digest": digest(found), "nnz": found.nnz}}
    return Beginning(entries_of(found), notes)


def inherits(parameters: MethodParameters) -> bool:
    """Whether the positions come from `init_from` as well."""
    return parameters.init_from is not None and parameters.init_positions == "inherit"


def train_inherited(parameters: MethodParameters, work: Work) -> Trained:
    """Train on what `init_from` has: its positions, beginning with its values.

    Raises:
        AdapterError: there is none, it is for another base, or it has no entries.
    """
    begin = beginning(parameters, work)
    positions = {name: part.positions for name, part in begin.entries.items()}
    nnz = sum(where.numel() for where in positions.values())
    if not nnz:
        problem = "it has no entries, so there is nothing to train"
        error = AdapterError(str(parameters.init_from), problem, 'Set init_positions to "select"')
        error.named_by("init_from")
        raise error
    density = work.density(nnz, {name: work.table[name] for name in positions})
    work.begin(density, {"train": work.steps}, len(positions))
    entries = work.sparse("train", positions, start=begin.values(positions))
    return Trained(entries, density, notes=begin.notes)
