"""What the small JSON files beside an adapter say, as far as we keep it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from gossamer.store.delta import Delta, DeltaSet
from gossamer.store.errors import printable
from gossamer.store.exchange.base import BaseWeights
from gossamer.store.exchange.formats import Imported

_MAX_INTEGER = 2**63


def recorded(config: Mapping[str, Any], keys: Iterable[str]) -> dict[str, Any]:
    """Those of the keys whose values are single: texts (clipped), numbers and truth values."""
    found: dict[str, Any] = {}
    for key in keys:
        value = config.get(key)
        if isinstance(value, str):
            found[key] = printable(value)
        elif isinstance(value, bool | float) or (
            isinstance(value, int) and abs(value) < _MAX_INTEGER
        ):
            found[key] = value
    return found


def made_for(config: Mapping[str, Any], key: str) -> str:
    """The base that the file says it is for; empty where it does not."""
    value = config.get(key)
    return printable(value) if isinstance(value, str) else ""


def imported(
    form: str,
    base: BaseWeights,
    base_name: str,
    deltas: Mapping[str, Delta],
    *,
    record: Mapping[str, Any],
    facts: Mapping[str, Any],
    warnings: Sequence[str] = (),
    fingerprint: str = "",
) -> Imported:
    """An `Imported` whose record says where it comes from.

    Args:
        form: the format's name.
        base_name: what the file says, or empty.
        record: what else the file says, JSON values.
        fingerprint: of the base, where its weights were used.
    """
    origin = {"imported": {"format": form, **record}}
    delta_set = DeltaSet(fingerprint, base_name or base.name, dict(deltas), origin)
    return Imported(delta_set, {"nnz": delta_set.nnz, **facts}, tuple(warnings))


def counted(count: int, one: str, many: str) -> str:
    """`1 entry`, `2,000 entries`."""
    return f"{count:,} {one if count == 1 else many}"


def sum_warnings(summed: int) -> tuple[str, ...]:
    """What a user is told where `summed` entries were at a position that was there before."""
    if not summed:
        return ()
    entries = counted(summed, "entry was", "entries were")
    return (f"{entries} at a position that was there before; they are added up, as they are there",)
