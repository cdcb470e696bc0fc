"""What a method's parameters refer to, opened: adapters of a catalog, files, and mixes of both.

A reference is `sql`, `sql:3`, `sql@sha256:…`, or a mix `sql*0.7+math*0.3`. A mix is what the server
answers with under that name: the weighted sum of its members (task arithmetic), over the union of
their entries. Other merge methods have no place in a reference, because their result depends on
parameters that it cannot name.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType

import numpy as np
from numpy.typing import NDArray

from gossamer.merge.errors import MixError
from gossamer.merge.mix import Member, canonical
from gossamer.store.catalog.door import Catalog
from gossamer.store.catalog.errors import AdapterCorrupt, AdapterNotFound, InvalidName, WrongBase
from gossamer.store.catalog.mixes import parse_terms
from gossamer.store.delta import Delta, DeltaSet
from gossamer.store.errors import AdapterFileError, DeltaError
from gossamer.store.format import digest, read
from gossamer.training.errors import AdapterError
from gossamer.training.starting import Adapters, no_adapters

#: A reference to one adapter → what it says.
OpenOne = Callable[[str], DeltaSet]


class CatalogAdapters:
    """The adapters of a tenant, as a run's `adapters`. Any process.

    Args:
        catalog: of the base that is trained on.
        tenant: whose adapters may be referred to.
        fixed: what references meant when the run was asked for: as given → `name@sha256:…`. Those
            that are not in it mean what they mean now.
    """

    def __init__(
        self, catalog: Catalog, tenant: str, fixed: Mapping[str, str] = MappingProxyType({})
    ) -> None:
        self._catalog = catalog
        self._tenant = tenant
        self._fixed = fixed

    def __call__(self, reference: str) -> DeltaSet:
        """What an adapter or a mix says.

        Raises:
            AdapterError: a member is not there (any more), is damaged, or is for another base; or
                the mix cannot be made.
            RegistryBusy, BlobStoreFailed: the store cannot say at the moment.
        """
        return opened_mix(reference, self._open)

    def _open(self, given: str) -> DeltaSet:
        wanted = self._fixed.get(given, given)
        try:
            with self._catalog.resolve(self._tenant, [wanted]) as resolution:
                (version,) = resolution.versions
                found = self._catalog.open(version.digest)
                if found.base_fingerprint:
                    return found
                # It does not say for which base it is; when it was uploaded it was found to fit.
                known = self._catalog.show(self._tenant, version.name).versions
                base = next(v.base_fingerprint for v in known if v.digest == version.digest)
                return replace(found, base_fingerprint=base)
        except AdapterNotFound as error:
            problem = "there is none of this name"
            if wanted != given:
                problem = f"it meant {wanted}, which has been deleted since"
            raise AdapterError(given, problem, "Name one that exists") from error
        except WrongBase as error:
            problem = (
                f"it is for the base {error.made_for[:16]}…, and this run's is {error.loaded[:16]}…"
            )
            raise AdapterError(given, problem, "Give one that was trained on this base") from error
        except AdapterCorrupt as error:
            raise AdapterError(given, f"it is damaged ({error.why})", "Upload it again") from error


class FileAdapters:
    """Adapter files under names of their own, before those that `others` knows.

    Args:
        files: name → packed adapter file.
        others: is asked for every other adapter.
    """

    def __init__(self, files: Mapping[str, Path], others: Adapters = no_adapters) -> None:
        self._files = files
        self._others = others

    def __call__(self, reference: str) -> DeltaSet:
        """What an adapter or a mix says.

        Raises:
            AdapterError: a file is not an adapter; or what `others` raises.
            OSError: a file cannot be read.
        """
        return opened_mix(reference, self._open)

    def _open(self, given: str) -> DeltaSet:
        if given not in self._files:
            return self._others(given)
        path = self._files[given]
        try:
            return read(path)
        except AdapterFileError as error:
            problem = f"{path} is no adapter file: {error.message}"
            raise AdapterError(given, problem, "Give a file that gossamer wrote") from error


def opened_mix(reference: str, open_one: OpenOne) -> DeltaSet:
    """What a reference says: an adapter as it is, or the weighted sum of several.

    Weights and the order of the sum are those of a served mix (`merge.mix.canonical`): members that
    say the same are one, with their weights summed. There may be any number of them, because they
    are summed once and not in every step.

    Raises:
        AdapterError: it is no reference, its members are for different bases, a weight is too
            large, or nothing is left of it.
        what `open_one` raises.
    """
    try:
        terms = parse_terms(reference)
    except InvalidName as error:
        raise AdapterError(reference, error.why, "Write name, or name*0.7+name*0.3") from error
    if len(terms) == 1 and terms[0].weight == 1.0:
        return open_one(terms[0].ref.given)
    found: dict[str, DeltaSet] = {}
    members = []
    for term in terms:
        delta_set = open_one(term.ref.given)
        identity = digest(delta_set)
        found[identity] = delta_set
        members.append(Member(identity, term.weight))
    try:
        mix = canonical(members, max_members=len(members))
    except MixError as error:
        raise AdapterError(reference, error.message, "Change the mix") from error
    weighted = [(found[member.digest], member.weight) for member in mix.members]
    if not weighted:
        raise AdapterError(reference, "its weights leave nothing of it", "Leave it out")
    if len(weighted) == 1 and weighted[0][1] == 1.0:
        return weighted[0][0]
    return _summed(reference, weighted, mix.digest)


def _summed(
    reference: str, weighted: Sequence[tuple[DeltaSet, float]], mix_digest: str
) -> DeltaSet:
    """Σ w·Δ in the given order."""
    first = weighted[0][0]
    if len({delta_set.base_fingerprint for delta_set, _ in weighted}) > 1:
        problem = "its members are for different bases"
        raise AdapterError(reference, problem, "Mix adapters of one base")
    names = sorted({name for delta_set, _ in weighted for name in delta_set.deltas})
    deltas = {}
    for name in names:
        parts = [(one.deltas[name], weight) for one, weight in weighted if name in one.deltas]
        try:
            deltas[name] = _sum_of_entries(parts)
        except DeltaError as error:
            problem = f"its sum cannot be stored: {name}: {error.message}"
            raise AdapterError(reference, problem, "Lower the weights") from error
    return DeltaSet(first.base_fingerprint, first.base_name, deltas, {"mix": mix_digest})


def _sum_of_entries(parts: Sequence[tuple[Delta, float]]) -> Delta:
    """The union of the entries of one weight, tiles taken apart: summed in float64, rounded once.

    An entry whose terms cancel stays: it belongs to the mix's support.
    """
    shape = parts[0][0].shape
    for delta, _ in parts:
        if delta.shape != shape:
            raise DeltaError(f"the members disagree about its shape, {shape} and {delta.shape}")
    entries = [(*delta.elements(), weight) for delta, weight in parts]
    positions: NDArray[np.int64] = np.unique(np.concatenate([where for where, _, _ in entries]))
    total: NDArray[np.float64] = np.zeros(len(positions), np.float64)
    for where, values, weight in entries:
        total[np.searchsorted(positions, where)] += weight * values.astype(np.float64)
    with np.errstate(over="ignore"):  # what overflows becomes inf, which no delta may hold
        return Delta.element(shape, positions, total.astype(np.float32), value_dtype="F32")
