"""Chains of adapters: a version that holds its parents whole, and what it adds to them.

A child of a chain is self-contained: it serves without its parents. Its record names them, each by
its digest and by the digest of its support (`support_digest`), under `chain`. With the parents at
hand the increment is the difference of two supports; the union of both is the child again, bit for
bit.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gossamer.store.catalog.mixes import MAX_PARENTS
from gossamer.store.delta import Delta, DeltaSet
from gossamer.store.errors import ChainError, printable
from gossamer.store.format import digest

_DIGEST = re.compile(r"sha256:[0-9a-f]{64}")


@dataclass(frozen=True)
class Parent:
    """What a child's record says of one of its parents: `sha256:<64 hex>` of each."""

    digest: str
    support: str


def support_digest(delta_set: DeltaSet) -> str:
    """`sha256:<hex>` over names and positions: two adapters of the same entries have one.

    By weight in the order of the names: the name, a zero byte, the number of entries in decimal
    digits, a zero byte, the row-major positions of the entries as little-endian int64.
    """
    state = hashlib.sha256()
    for name in sorted(delta_set.deltas):
        positions = delta_set.deltas[name].elements()[0]
        state.update(f"{name}\0{len(positions)}\0".encode())
        state.update(positions.astype("<i8").tobytes())
    return f"sha256:{state.hexdigest()}"


def parents_of(record: Mapping[str, Any]) -> tuple[Parent, ...]:
    """The parents that a version's record names. Records come from uploads: nothing is taken on
    trust.

    Raises:
        ChainError: it names none, one of them twice, or not as a chain's child does.
    """
    chain = record.get("chain")
    if not isinstance(chain, list) or not chain:
        raise ChainError("its record names no parents")
    if len(chain) > MAX_PARENTS:
        raise ChainError(f"its record names more than {MAX_PARENTS} parents")
    parents = tuple(_parent(entry) for entry in chain)
    if len({parent.digest for parent in parents}) < len(parents):
        raise ChainError("its record names a parent more than once")
    return parents


def _parent(entry: Any) -> Parent:
    fields = entry if isinstance(entry, dict) else {}
    named, support = fields.get("digest"), fields.get("support")
    for value in (named, support):
        if not isinstance(value, str) or not _DIGEST.fullmatch(value):
            raise ChainError("its record does not name its parents by their digests")
    return Parent(str(named), str(support))


def increment(child: DeltaSet, parents: Iterable[tuple[Parent, DeltaSet]]) -> DeltaSet:
    """The entries of a version that none of its parents has.

    Args:
        child: the version.
        parents: what its record says of each, and the parent. Each is let go before the next is
            asked for, so that one that opens them has a single one in memory.

    Returns:
        An adapter whose record says, under `increment`, of which version it is the increment and
        over which parents. The values are the child's, bit for bit; an entry of a tile stands by
        itself.

    Raises:
        ChainError: a parent's support is another than the record says, an entry of a parent is not
            in the child as it is there, or nothing is left.
    """
    elements = {name: delta.elements() for name, delta in child.deltas.items()}
    own = {name: np.ones(len(where), np.bool_) for name, (where, _) in elements.items()}
    named: list[Parent] = []
    for parent, delta_set in parents:
        _strike_out(parent, delta_set, elements, own)
        del delta_set  # it would stay until the next one is there
        named.append(parent)
    kept = {n: _part(child.deltas[n], *elements[n], mask) for n, mask in own.items() if mask.any()}
    if not kept:
        raise ChainError("it adds nothing to its parents")
    record = {"increment": {"of": digest(child), "parents": [asdict(one) for one in named]}}
    return replace(child, deltas=kept, record=record)


Elements = Mapping[str, tuple[NDArray[np.int64], NDArray[np.float32]]]


def _strike_out(
    parent: Parent, delta_set: DeltaSet, elements: Elements, own: Mapping[str, NDArray[np.bool_]]
) -> None:
    """Mark the child's entries that are the parent's as not its own, in place."""
    if support_digest(delta_set) != parent.support:
        raise ChainError(f"its record names other entries than {_short(parent)} has")
    for name, delta in delta_set.deltas.items():
        if delta.nnz:
            at = _held(parent, name, delta, elements)
            own[name][at] = False


def _held(parent: Parent, name: str, delta: Delta, elements: Elements) -> NDArray[np.int64]:
    """Where the child has the parent's entries of a weight."""
    if name in elements:
        (where, values), (positions, wanted) = elements[name], delta.elements()
        at = np.searchsorted(where, positions).clip(max=len(where) - 1)
        found = len(where) and np.array_equal(where[at], positions)
        if found and np.array_equal(values[at].view(np.uint32), wanted.view(np.uint32)):
            return at
    raise ChainError(f"it does not hold {_short(parent)} whole: {printable(name)} differs")


def _part(
    delta: Delta,
    positions: NDArray[np.int64],
    values: NDArray[np.float32],
    mask: NDArray[np.bool_],
) -> Delta:
    if delta.kind == "element":
        return replace(delta, positions=delta.positions[mask], values=delta.values[mask])
    dtype = delta.value_dtype if delta.scale == 1.0 else "F32"  # scaled values may need all bits
    return Delta.element(delta.shape, positions[mask], values[mask], value_dtype=dtype)


def _short(parent: Parent) -> str:
    return f"its parent {parent.digest[:19]}…"
