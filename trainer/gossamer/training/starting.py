"""Adapters that a run begins with: to be trained on, or to be left alone."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from gossamer.store.chains import support_digest
from gossamer.store.delta import DeltaSet
from gossamer.store.format import digest
from gossamer.training.errors import AdapterError, OverlapError
from gossamer.training.sparse import Entries

#: A reference (an adapter's name or version, a mix, a file) → what it says.
Adapters = Callable[[str], DeltaSet]
#: Base weight name → entries of it.
Weights = Mapping[str, Entries]


def no_adapters(reference: str) -> DeltaSet:
    """Where there is no store, nothing can be referred to.

    Raises:
        AdapterError: always.
    """
    raise AdapterError(reference, "this run has no adapters to begin with", "Leave it out")


def entries_of(delta_set: DeltaSet) -> dict[str, Entries]:
    """All entries of an adapter, by weight; those of tiles too. A weight without any, which a file
    may name, is left out."""
    found = {}
    for name, delta in delta_set.deltas.items():
        if delta.nnz:
            positions, values = delta.elements()
            found[name] = Entries(torch.tensor(positions), torch.tensor(values))
    return found


def opened(
    adapters: Adapters,
    reference: str,
    field: str,
    fingerprint: str,
    table: Mapping[str, tuple[int, int]],
) -> DeltaSet:
    """The adapter that a reference means.

    Args:
        reference: as the parameters have it.
        field: the parameter that has it, for errors.
        fingerprint: of the base.
        table: base weight name → (out_features, in_features) of all that an adapter may change.

    Raises:
        AdapterError: there is none, or it is for another base.
    """
    try:
        found = adapters(reference)
        _check_base(reference, found, fingerprint, table)
    except AdapterError as error:
        error.named_by(field)
        raise
    return found


def _check_base(
    reference: str, found: DeltaSet, fingerprint: str, table: Mapping[str, tuple[int, int]]
) -> None:
    if found.base_fingerprint != fingerprint:
        raise AdapterError(
            reference,
            f"it is for the base {found.base_fingerprint[:16]}…, and this run's is "
            f"{fingerprint[:16]}…",
            "Give one that was trained on this base",
        )
    for name, delta in found.deltas.items():
        if table.get(name) != delta.shape:
            raise AdapterError(reference, f"the base has no {name} {delta.shape}", "Give another")


@dataclass(frozen=True)
class Chain:
    """Adapters trained one beside the other, each on entries that no other has.

    Attributes:
        links: what was given and what it says, in order.
        entries: of all of them together.
    """

    links: Sequence[tuple[str, DeltaSet]]
    entries: Weights

    @property
    def nnz(self) -> int:
        """Entries that the chain has taken."""
        return sum(part.positions.numel() for part in self.entries.values())

    def record(self) -> list[dict[str, Any]]:
        """What a child says about its parents. The supports themselves would not fit a file's
        header (at 10 % of 135 M weights, 10 MB); their digest proves which entries they are."""
        return [
            {"digest": digest(link), "nnz": link.nnz, "support": support_digest(link)}
            for _, link in self.links
        ]


def chained(links: Sequence[tuple[str, DeltaSet]]) -> Chain:
    """One after the other.

    A link that holds all entries of another one, with their values, stands for that as well, as a
    later link of a chain does: it is self-contained. So their order is of no importance.

    Args:
        links: by the references in `parents`, in that order.

    Raises:
        OverlapError: two share entries.
    """
    kept: list[tuple[str, DeltaSet]] = []
    places = {reference: place for place, (reference, _) in enumerate(links)}
    for reference, link in links:
        if any(_contains(before, link) for _, before in kept):
            continue
        kept = [(other, before) for other, before in kept if not _contains(link, before)]
        for other, before in kept:
            try:
                _check_disjoint(reference, link, other, before)
            except OverlapError as error:
                error.named_by(f"parents.{places[reference]}")
                raise
        kept.append((reference, link))
    parts = [entries_of(link) for _, link in kept]
    names = sorted({name for part in parts for name in part})
    return Chain(kept, {n: _union([part[n] for part in parts if n in part]) for n in names})


def _contains(whole: DeltaSet, part: DeltaSet) -> bool:
    for name, delta in part.deltas.items():
        if not delta.nnz:
            continue
        if name not in whole.deltas or not whole.deltas[name].nnz:
            return False
        positions, values = delta.elements()
        all_positions, all_values = whole.deltas[name].elements()
        at = np.searchsorted(all_positions, positions)
        at = np.minimum(at, len(all_positions) - 1)
        if not (
            np.array_equal(all_positions[at], positions) and np.array_equal(all_values[at], values)
        ):
            return False
    return True


def _check_disjoint(reference: str, one: DeltaSet, other: str, two: DeltaSet) -> None:
    for name in one.deltas.keys() & two.deltas.keys():
        mine, theirs = one.deltas[name].elements()[0], two.deltas[name].elements()[0]
        shared = int(np.isin(mine, theirs, assume_unique=True).sum())
        if shared:
            raise OverlapError(reference, other, name, shared)


def _union(parts: Sequence[Entries]) -> Entries:
    positions = torch.cat([part.positions for part in parts])
    order = positions.argsort()
    return Entries(positions[order], torch.cat([part.values for part in parts])[order])


def union(one: Weights, two: Weights) -> dict[str, Entries]:
    """Both, where they share nothing."""
    names = [*one, *(name for name in two if name not in one)]
    return {name: _union([part[name] for part in (one, two) if name in part]) for name in names}


def without(entries: Weights, positions: Mapping[str, torch.Tensor]) -> dict[str, Entries]:
    """The entries that do not lie at these positions."""
    rest = {}
    for name, part in entries.items():
        keep = torch.ones(part.positions.numel(), dtype=torch.bool)
        if name in positions:
            keep = ~torch.isin(part.positions, positions[name], assume_unique=True)
        if keep.any():
            rest[name] = Entries(part.positions[keep], part.values[keep])
    return rest


def at(entries: Weights, name: str, positions: torch.Tensor) -> torch.Tensor:
    """The entries' values at these positions of a weight, 0 where there is none: float32 [n]."""
    values = torch.zeros(positions.numel())
    if name in entries and entries[name].positions.numel():
        part = entries[name]
        place = torch.searchsorted(part.positions, positions).clamp(max=part.positions.numel() - 1)
        there = part.positions[place] == positions
        values[there] = part.values[place[there]].float()
    return values
