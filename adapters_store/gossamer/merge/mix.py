"""A mix: the members, weights and method that a request runs with, in one canonical form."""

from __future__ import annotations

import hashlib
import json
import math
import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gossamer.merge.errors import MixError
from gossamer.merge.methods import Method, Parameters, method_named

#: The default limits of a mix.
MAX_MEMBERS = 8
MAX_WEIGHT = 16.0

_DOMAIN = b"gossamer/mix/1\0"


@dataclass(frozen=True)
class Member:
    """One adapter version in a mix: its digest, and a weight that is a float32 exactly."""

    digest: str
    weight: float


@dataclass(frozen=True)
class Mix:
    """What a request runs with. Build it with `canonical`; then equal mixes compare equal.

    Attributes:
        members: by digest in byte order; none is the base.
        method: a name from the registry.
        params: (name, value) of every parameter that is not said by the weights, by name.
    """

    members: tuple[Member, ...] = ()
    method: str = "linear"
    params: tuple[tuple[str, Any], ...] = ()

    @cached_property
    def digest(self) -> str:
        """`sha256:<hex>` over method, parameters, member digests and float32 weights.

        It identifies the mix in caches, KV pages, metrics and reply headers.
        """
        params = json.dumps(dict(self.params), sort_keys=True, separators=(",", ":"))
        state = hashlib.sha256(_DOMAIN + _text(self.method) + _text(params))
        state.update(struct.pack("<Q", len(self.members)))
        for member in self.members:
            state.update(_text(member.digest) + struct.pack("<f", member.weight))
        return f"sha256:{state.hexdigest()}"

    @property
    def is_base(self) -> bool:
        """Whether this is the base model itself."""
        return not self.members


#: The empty mix: the base model as it is.
BASE = Mix()


def _text(text: str) -> bytes:
    data = text.encode()
    return struct.pack("<Q", len(data)) + data


def canonical(
    members: Iterable[Member],
    method: str = "linear",
    params: Mapping[str, Any] | None = None,
    *,
    max_members: int = MAX_MEMBERS,
    max_weight: float = MAX_WEIGHT,
) -> Mix:
    """The one form of a mix, so that what is equal has one digest.

    Weights are rounded to float32; those of equal digests are summed; zero weights are dropped;
    members are sorted by digest. Parameters that only scale the weights are multiplied into them,
    so `linear` never keeps any: λ = 2 over (a, 0.5) is a. A method of a single member is `linear`,
    because every method gives weight · τ where one member is present. No member left is `BASE`.

    Args:
        members: in any order, digests may repeat.
        method: a name from `METHODS`.
        params: the method's parameters; missing ones take their defaults.
        max_members: how many different members may remain.
        max_weight: the largest |weight|, before and after folding the parameters in.

    Raises:
        MixError: the method or a parameter is unknown, a weight is not finite or too large, or
            there are too many members; `field` says which.
    """
    row = method_named(method)
    checked = row.checked(params or {})
    weights = _sum_weights(members, max_weight)
    if len(weights) > max_members:
        message = f"a mix of {len(weights)} members, at most {max_members} are allowed"
        raise MixError("invalid_mix", message, field="members")
    if row.fold is not None and weights:
        weights = _fold(row, checked, weights, max_weight)
        checked = {}
    kept = tuple(Member(digest, weight) for digest, weight in sorted(weights.items()))
    if len(kept) < 2:
        return Mix(kept)
    return Mix(kept, row.name, tuple(sorted(checked.items())))


def _sum_weights(members: Iterable[Member], max_weight: float) -> dict[str, float]:
    """Weights by digest, float32, without zeros."""
    terms: dict[str, list[float]] = {}
    for index, member in enumerate(members):
        field = f"members[{index}].weight"
        given: Any = member.weight
        if not isinstance(given, int | float) or isinstance(given, bool):
            raise MixError("invalid_mix", f"{field} must be a number", field=field)
        weight = _float32(given, field, field, max_weight)
        terms.setdefault(member.digest, []).append(weight)
    summed = {
        digest: _float32(math.fsum(parts), f"the weight of {digest}", "members", max_weight)
        for digest, parts in terms.items()
    }
    return {digest: weight for digest, weight in summed.items() if weight != 0.0}


def _fold(
    row: Method, params: Parameters, weights: Mapping[str, float], max_weight: float
) -> dict[str, float]:
    digests = sorted(weights)
    given: NDArray[np.float64] = np.array([weights[digest] for digest in digests], np.float64)
    folded = given if row.fold is None else row.fold(given, params)
    rounded = {
        digest: _float32(
            weight, f"with {dict(params)}, the weight of {digest}", "params", max_weight
        )
        for digest, weight in zip(digests, folded.tolist(), strict=True)
    }
    return {digest: weight for digest, weight in rounded.items() if weight != 0.0}


def _float32(weight: float, what: str, field: str, max_weight: float) -> float:
    """The weight as a float32, within the limit."""
    if not math.isfinite(weight) or abs(weight) > max_weight:
        message = f"{what} must be finite and in [-{max_weight:g}, {max_weight:g}]"
        raise MixError("invalid_mix", message, field=field)
    return float(np.float32(weight))
