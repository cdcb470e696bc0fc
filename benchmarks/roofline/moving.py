"""Everything but a decode step: prefills, fusing, loads."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from benchmarks.roofline.cards import Rates
from benchmarks.roofline.models import BYTES, Model, Weight
from benchmarks.roofline.packed import Coding, Packed, expected
from benchmarks.roofline.step import DELTA_LAUNCHES, adapter_bytes, chunks, handed_on, width
from gossamer.kernels.plan import CHUNK_ROWS

#: The memory is read and written in sectors of so many bytes: to write 2 of them, all are read.
SECTOR: Final = 32
#: Clearing the scratch, writing Δ into it, the product.
DENSE_LAUNCHES: Final = 3
#: Rows up to which a crossover is looked for.
MOST_ROWS: Final = 1 << 13
#: A crossover behind more rows is left out of the rule: there, choosing wrong costs little.
RULE_ROWS: Final = 1 << 10


def touched_sectors(weight: Weight, density: float) -> float:
    """Sectors of a bf16 weight in which a random mask has an entry."""
    each = SECTOR // BYTES
    return weight.elements / each * (1 - (1 - density) ** each)


def gather_seconds(model: Model, rates: Rates, rows: int, density: float, coding: Coding) -> float:
    """One adapter's terms for so many rows of a prefill, entry by entry."""
    total = 0.0
    for weight, packed in _deltas(model, density, coding):
        work = sum(packed.instructions(width(count)) for count, _ in chunks(rows, 1))
        moved = packed.read_bytes + rates.handed_on * handed_on(weight, rows, 1)
        slower = max(moved / rates.bandwidth, work / rates.instructions)
        total += DELTA_LAUNCHES * rates.launch + slower
    return model.layers * total


def dense_seconds(model: Model, rates: Rates, rows: int, density: float, coding: Coding) -> float:
    """The same through a scratch of Δ alone, dense in bf16: cleared, written into, multiplied."""
    total = 0.0
    for weight, packed in _deltas(model, density, coding):
        cleared = BYTES * weight.elements
        written = packed.read_bytes + 2 * SECTOR * touched_sectors(weight, density)
        handed = rates.handed_on * rows * (BYTES * weight.columns + 2 * 4 * weight.rows)
        read = BYTES * weight.elements + handed
        product = max(read / rates.bandwidth, 2 * rows * weight.elements / rates.flops)
        total += DENSE_LAUNCHES * rates.launch + (cleared + written) / rates.bandwidth + product
    return model.layers * total


def crossover(model: Model, rates: Rates, density: float, coding: Coding) -> int | None:
    """The fewest rows, in whole chunks, from which the scratch is faster.

    Returns:
        None if it is not at `MOST_ROWS` either.
    """

    def pays(rows: int) -> bool:
        dense = dense_seconds(model, rates, rows, density, coding)
        return dense < gather_seconds(model, rates, rows, density, coding)

    if not pays(MOST_ROWS):
        return None
    low, high = 0, MOST_ROWS // CHUNK_ROWS
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if pays(CHUNK_ROWS * middle) else (middle, high)
    return CHUNK_ROWS * high


@dataclass(frozen=True, slots=True)
class ScratchRule:
    """When a chunk of rows of one adapter goes through the scratch, in a form to dispatch on.

    Gathering costs as its terms, rows × entries; the scratch costs mostly as the weight's elements,
    as long as its product waits for memory. So what counts is the quotient.

    Attributes:
        density: below it, gathering.
        terms: rows × density from which the scratch is faster.
    """

    density: float
    terms: float

    def pays(self, rows: int, density: float) -> bool:
        """Whether the scratch is expected to be faster."""
        return density >= self.density and rows * density >= self.terms

    @classmethod
    def of(
        cls, model: Model, rates: Rates, densities: Sequence[float], coding: Coding
    ) -> ScratchRule | None:
        """The rule from the crossovers at some densities: their geometric mean.

        Returns:
            None if up to `RULE_ROWS` rows gathering is faster at all of them.
        """
        found = {p: crossover(model, rates, p, coding) for p in densities}
        crossing = {p: rows for p, rows in found.items() if rows and rows <= RULE_ROWS}
        if not crossing:
            return None
        terms = statistics.geometric_mean(p * rows for p, rows in crossing.items())
        return cls(min(crossing), terms)


def fuse_seconds(model: Model, rates: Rates, density: float, coding: Coding) -> float:
    """Writing an adapter into all weights, or taking it out again: one launch, which moves as much.

    Units are read, sectors read and written, and entries saved, or read from where they were saved.
    """
    moved = sum(
        packed.read_bytes + BYTES * packed.entries + 2 * SECTOR * touched_sectors(weight, density)
        for weight, packed in _deltas(model, density, coding)
    )
    return rates.launch + model.layers * moved / rates.bandwidth


def load_seconds(model: Model, rates: Rates, density: float, coding: Coding) -> float:
    """An adapter's copy from the host."""
    return adapter_bytes(model, density, coding) / rates.host


def _deltas(model: Model, density: float, coding: Coding) -> list[tuple[Weight, Packed]]:
    return [(w, expected(w.rows, w.columns, density, coding)) for w in model.weights]
