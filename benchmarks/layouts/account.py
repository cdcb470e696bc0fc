"""What a candidate costs on one weight: bytes, and rounds of its inner loop."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from benchmarks.layouts.entries import Entries
from benchmarks.layouts.layout import Layout, Packed


@dataclass(frozen=True, slots=True)
class Account:
    """Sums over one weight or several.

    Attributes:
        nnz: entries.
        nbytes, nbytes8: everything that is read, with 16-bit and with 8-bit values.
        slots: places for an entry that the kernel's threads go through; more than `nnz`, because
            they wait for the longest row, or look at what is no entry.
        programs: programs of the kernel.
        imbalance: rounds of the longest program over the mean; of several weights, the worst.
    """

    nnz: int
    nbytes: int
    nbytes8: int
    slots: int
    programs: int
    imbalance: float


def account(layout: Layout, entries: Entries) -> tuple[Account, Packed]:
    """Packs, and adds up."""
    packed = layout.pack(entries)
    steps = int(packed.steps.sum())
    found = Account(
        nnz=packed.nnz,
        nbytes=packed.nbytes,
        nbytes8=packed.nbytes8 if layout.bytes8 is None else layout.bytes8(entries),
        slots=steps * layout.step(1).slots,
        programs=len(packed.steps),
        imbalance=float(packed.steps.max() / packed.steps.mean()) if steps else 1.0,
    )
    return found, packed


def total(accounts: Iterable[Account]) -> Account:
    """Of several weights, each with a launch of its own."""
    parts = list(accounts)
    return Account(
        nnz=sum(each.nnz for each in parts),
        nbytes=sum(each.nbytes for each in parts),
        nbytes8=sum(each.nbytes8 for each in parts),
        slots=sum(each.slots for each in parts),
        programs=sum(each.programs for each in parts),
        imbalance=max(each.imbalance for each in parts),
    )
