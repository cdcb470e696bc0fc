"""A full fine-tuned checkpoint: what it differs from its base by, or the most of it."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gossamer.store.delta import Delta
from gossamer.store.errors import AdapterFileError, printable
from gossamer.store.exchange.base import BaseWeights
from gossamer.store.exchange.building import element_delta
from gossamer.store.exchange.checkpoint_names import CONFIG, Matched, check_config, match
from gossamer.store.exchange.files import Files
from gossamer.store.exchange.formats import Format, Imported, Importer, ImportOptions
from gossamer.store.exchange.largest import Cut, Largest
from gossamer.store.exchange.records import counted, imported, recorded
from gossamer.store.exchange.shards import Stored, is_checkpoint
from gossamer.store.format.container import invalid
from gossamer.store.values import from_carrier, magnitude_bits, to_carrier

_NAME = "checkpoint"
#: Elements compared at a time: their float32 copies stay small beside a weight.
_CHUNK = 1 << 20
_NAMED = 3


@dataclass(frozen=True)
class _Part:
    """Where a run of a tensor differs from the base.

    Attributes:
        positions: int64 [n], row-major in the whole tensor, ascending.
        values: float32 [n], what to add to the base there.
        rounding: how many entries differ from the base as much as their dtype rounds it.
    """

    positions: NDArray[np.int64]
    values: NDArray[np.float32]
    rounding: int


@dataclass
class _Tally:
    """What has been seen, over all weights.

    Attributes:
        differing: entries.
        squares: the sum of their squares.
        rounding: entries that differ by rounding only.
    """

    differing: int = 0
    squares: float = 0.0
    rounding: int = 0

    def count(self, values: NDArray[np.float32], rounding: int) -> None:
        """One more part."""
        self.differing += values.size
        with np.errstate(invalid="ignore", over="ignore"):  # refused where the delta is made
            self.squares += float(np.square(values, dtype=np.float64).sum())
        self.rounding += rounding


@dataclass(frozen=True)
class _Compared:
    """The deltas, and what they are of.

    Attributes:
        seen: all differences.
        kept: those in the deltas.
    """

    deltas: Mapping[str, Delta]
    seen: _Tally
    kept: _Tally = field(default_factory=_Tally)


def _detect(files: Files) -> bool:
    return is_checkpoint(files) and CONFIG in files and "adapter_config.json" not in files


def _read(files: Files, base: BaseWeights, options: ImportOptions) -> Imported:
    config, warnings = check_config(files, base)
    matched = match(files, base)
    _check_others(matched, base)
    elements = sum(math.prod(shape) for shape in base.table.values())
    if options.density is None:
        deltas, seen = _take(matched, base, options, None)
        compared = _Compared(deltas, seen, seen)
    else:
        compared = _most(matched, base, options, _count(options.density, elements))
    facts = {"elements": elements, **_facts(matched, base, compared)}
    return imported(
        _NAME,
        base,
        "",
        compared.deltas,
        record={**recorded(config, ("model_type", "_name_or_path")), **facts},
        facts=facts,
        warnings=(*warnings, *_warnings(facts)),
        fingerprint=base.fingerprint,
    )


def _count(density: float, elements: int) -> int:
    """How many entries a density is.

    Raises:
        ValueError: it is not in (0, 1].
    """
    if not 0 < density <= 1:
        raise ValueError(f"a density is in (0, 1], not {density}")
    return max(1, round(density * elements))


def _check_others(matched: Matched, base: BaseWeights) -> None:
    """Nothing differs but linear weights.

    Raises:
        AdapterFileError: `unsupported_module`, with the first three that do.
    """
    pairs = [(own, stored, own) for own, stored in matched.places.items() if own not in base.table]
    pairs += [(twin.name, twin.stored, twin.own) for twin in matched.twins]
    found: list[tuple[str, str]] = []
    for name, stored, own in pairs:
        differing = sum(part.positions.size for part in _parts(matched, base, stored, own))
        if differing:
            of = math.prod(stored.shape)
            found.append((name, f"{printable(name)} ({differing:,} of {of:,} elements)"))
    if found:
        named = ", ".join(text for _, text in found[:_NAMED])
        more = f" and {len(found) - _NAMED} more" if len(found) > _NAMED else ""
        raise AdapterFileError(
            "unsupported_module",
            f"the checkpoint changes {named}{more}; an adapter changes linear weights only",
            tensor=found[0][0],
        )


def _most(matched: Matched, base: BaseWeights, options: ImportOptions, count: int) -> _Compared:
    """The `count` largest differences of all weights: one pass to find the cut, one to take."""
    largest, seen = Largest(count), _Tally()
    for name in base.table:
        for part in _parts(matched, base, matched.places[name], name):
            largest.add(magnitude_bits(part.values, "F32"))
            seen.count(part.values, part.rounding)
    deltas, kept = _take(matched, base, options, largest.cut())
    if kept.differing != min(count, seen.differing):
        invalid("the checkpoint changed while it was read")
    return _Compared(deltas, seen, kept)


def _take(
    matched: Matched, base: BaseWeights, options: ImportOptions, cut: Cut | None
) -> tuple[dict[str, Delta], _Tally]:
    """The differences above the cut, or all; and what was taken."""
    deltas: dict[str, Delta] = {}
    taken = _Tally()
    ties = 0 if cut is None else cut.ties
    for name, shape in base.table.items():
        positions: list[NDArray[np.int64]] = []
        values: list[NDArray[np.float32]] = []
        for part in _parts(matched, base, matched.places[name], name):
            keep = slice(None) if cut is None else _above(part.values, Cut(cut.bits, ties))
            where, what = part.positions[keep], part.values[keep]
            if cut is not None:
                ties -= int((magnitude_bits(what, "F32") == cut.bits).sum())
            taken.count(what, part.rounding)
            if where.size:
                positions.append(where)
                values.append(what)
        if positions:
            deltas[name] = element_delta(
                name,
                shape,
                np.concatenate(positions),
                np.concatenate(values),
                "F32",
                rounded_to=options.value_dtype,
            )
    return deltas, taken


def _above(values: NDArray[np.float32], cut: Cut) -> NDArray[np.bool_]:
    """Which are above the cut, or among its first ties; by position where they are equal."""
    bits = magnitude_bits(values, "F32")
    keep: NDArray[np.bool_] = bits > cut.bits
    keep[np.flatnonzero(bits == cut.bits)[: cut.ties]] = True
    return keep


def _parts(matched: Matched, base: BaseWeights, stored: Stored, own: str) -> Iterator[_Part]:
    """What a tensor differs by from the base's parameter `own`, run by run.

    An entry that is the base's, rounded to the checkpoint's dtype, is not taken for a difference.
    Where there is one, what is added to the base itself makes it the checkpoint's value.
    """
    there, dtype = matched.shards.read_values(stored)
    here, base_dtype = base.read(own)
    there, here = there.reshape(-1), here.reshape(-1)
    for start in range(0, there.size, _CHUNK):
        new = from_carrier(there[start : start + _CHUNK], dtype)
        old = from_carrier(here[start : start + _CHUNK], base_dtype)
        rounded = (
            old if dtype in ("F32", base_dtype) else from_carrier(to_carrier(old, dtype), dtype)
        )
        differ = new != rounded
        at = np.flatnonzero(differ)
        with np.errstate(invalid="ignore", over="ignore"):  # refused where the delta is made
            values = new[at] - old[at]
        rounding = 0 if rounded is old else int(((new != old) & ~differ).sum())
        yield _Part(at + start, values, rounding)


def _facts(matched: Matched, base: BaseWeights, compared: _Compared) -> dict[str, Any]:
    seen, kept = compared.seen, compared.kept
    dtypes: dict[str, int] = {}
    for name in base.table:
        dtype = matched.places[name].dtype
        dtypes[dtype] = dtypes.get(dtype, 0) + 1
    squares = kept.squares / seen.squares if seen.squares else 1.0
    return {
        "weights": len(base.table),
        "dtypes": dtypes,
        "differing": seen.differing,
        "kept": kept.differing,
        "norm_kept": math.sqrt(squares),
        "squares_kept": squares,
        "rounding_only": seen.rounding,
        "buffers_ignored": len(matched.ignored),
    }


def _warnings(facts: Mapping[str, Any]) -> Iterator[str]:
    differing, kept = facts["differing"], facts["kept"]
    if not differing:
        yield "no linear weight differs from the base: the adapter is empty"
    if kept < differing:
        yield (
            f"{kept:,} of {differing:,} differences are kept, which have "
            f"{facts['norm_kept']:.1%} of their norm"
        )
    if facts["rounding_only"]:
        entries = counted(facts["rounding_only"], "entry is", "entries are")
        yield f"{entries} the base's, rounded to the checkpoint's dtype: not taken as differences"
    if "F64" in facts["dtypes"]:
        yield "the checkpoint's float64 values were rounded to float32"


FORMAT = Format(
    _NAME,
    "full fine-tuned checkpoint, against its base",
    "https://huggingface.co/docs/safetensors",
    importer=Importer(_detect, _read, takes_density=True),
)
