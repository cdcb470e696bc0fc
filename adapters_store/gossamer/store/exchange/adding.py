"""Deltas added to the weights that they are for: in float32, rounded once."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gossamer.store.delta import DeltaSet
from gossamer.store.errors import AdapterFileError, printable
from gossamer.store.exchange.base import BaseWeights
from gossamer.store.exchange.names import check_names
from gossamer.store.values import ValueDtype, from_carrier, to_carrier

#: The smallest share of lost differences that a user is told of: float32 loses a few in a million.
_WORTH_SAYING = 0.001


def check_base(delta_set: DeltaSet, base: BaseWeights) -> None:
    """Whether an adapter is for these weights.

    Raises:
        AdapterFileError: `base_model_mismatch`, made for another base, or of other names or shapes.
    """
    made_for = delta_set.base_fingerprint
    if made_for and made_for != base.fingerprint:
        raise AdapterFileError(
            "base_model_mismatch",
            f"the adapter is for the base {printable(delta_set.base_name)} ({made_for[:16]}…), "
            f"these are the weights of {base.name} ({base.fingerprint[:16]}…)",
        )
    shapes = {name: delta.shape for name, delta in delta_set.deltas.items()}
    check_names(base, shapes, delta_set.base_name)


def added(
    name: str,
    stored: NDArray[Any],
    dtype: ValueDtype,
    difference: NDArray[np.float32],
    target: ValueDtype,
) -> tuple[NDArray[Any], NDArray[np.bool_]]:
    """Entries of a weight with their differences.

    Args:
        name: of the weight.
        stored: [n] in the carrier of `dtype`.
        difference: [n]
        target: the dtype of the result.

    Returns:
        The sums [n] in the carrier of `target`, and which of them the rounding made what they were
        without the difference.

    Raises:
        AdapterFileError: a sum is not finite in `target`.
    """
    before = from_carrier(stored, dtype)
    sums = to_carrier(before + difference, target)
    rounded = from_carrier(sums, target)
    finite = np.isfinite(rounded)
    if not finite.all():
        at = int((~finite).argmax())
        raise AdapterFileError(
            "invalid_adapter_file",
            f"{printable(name)}: {before[at]:g} + {difference[at]:g} is not finite in {target}",
            tensor=name,
            position=at,
        )
    same: NDArray[np.bool_] = rounded == from_carrier(to_carrier(before, target), target)
    return sums, same


class Absorption:
    """How many differences that are not zero rounding swallowed, weight by weight."""

    def __init__(self) -> None:
        self._counts: dict[str, tuple[int, int]] = {}

    def count(self, name: str, difference: NDArray[np.float32], same: NDArray[np.bool_]) -> None:
        """The differences of one weight, and which entries they did not change."""
        real = difference != 0
        self._counts[name] = int(real.sum()), int((real & same).sum())

    def facts(self) -> Mapping[str, Any]:
        """The share of all, and the weight with the largest share; JSON values."""
        real = sum(count for count, _ in self._counts.values())
        swallowed = sum(count for _, count in self._counts.values())
        shares = {n: lost / count for n, (count, lost) in self._counts.items() if count}
        found: dict[str, Any] = {"absorbed": swallowed / real if real else 0.0}
        if swallowed:
            worst = max(shares, key=lambda name: shares[name])
            found["absorbed_most"] = {"weight": worst, "share": shares[worst]}
        return found

    def warnings(self, target: str) -> tuple[str, ...]:
        """What a user is told of it.

        Args:
            target: the dtype that was rounded to.
        """
        share = self.facts()["absorbed"]
        if share < _WORTH_SAYING:
            return ()
        return (
            f"{share:.1%} of the differences are lost in rounding to {target}: those weights are "
            "the base's",
        )
