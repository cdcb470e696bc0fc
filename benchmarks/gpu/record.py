"""The results file: a line a figure, written as soon as it is there.

The columns are those of `benchmarks.roofline.measured`, then

    bytes       that must be read and written at least, where that is counted
    floor       ms that they take at the run's own copy bandwidth
    predicted   of `benchmarks.roofline`, in the line's unit, where it has one
    note        what else a reader must know
"""

from __future__ import annotations

import csv
from collections.abc import Mapping
from pathlib import Path
from typing import Final, TextIO

from benchmarks.roofline.cards import CARDS, Card, Rates
from benchmarks.roofline.measured import CODINGS, Case, predict
from benchmarks.roofline.measured import COLUMNS as MEASURED
from benchmarks.roofline.models import MODELS

#: Stands for the card in a dry run, so that nobody takes its figures for a card's.
INTERPRETER: Final = "interpreter"
EXTRA: Final = ("bytes", "floor", "predicted", "note")
COLUMNS: Final = (*MEASURED, *EXTRA)
#: (table, what) that the roofline predicts.
_PREDICTED: Final = {
    ("decode", "step"), ("bytes", "entry"), ("prefill", "gather"), ("prefill", "dense"),
    ("fuse", "fuse"), ("fuse", "undo"), ("load", "load"),
}  # fmt: skip


class Record:
    """Appends lines to a results file and prints them.

    Args:
        file: open for writing; gets the head at once.
        card: as its driver names it.
        stamp: driver, versions, commit, date.
        copy_bandwidth: bytes/s, read and written, of this run.
    """

    def __init__(
        self, file: TextIO, card: str, stamp: Mapping[str, str], copy_bandwidth: float
    ) -> None:
        self._file = file
        self._writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        self._writer.writeheader()
        self._stamp = {"card": card, **stamp}
        self.copy_bandwidth = copy_bandwidth
        self._rates = _rates(card, copy_bandwidth)
        self.counts: dict[str, int] = {}

    def add(
        self,
        table: str,
        what: str,
        value: float,
        unit: str,
        *,
        model: str = "",
        rows: int = 0,
        adapters: int | None = None,
        density: float = 0.0,
        coding: str = "",
        context: int = 0,
        nbytes: float = 0.0,
        note: str = "",
    ) -> None:
        """One figure; `adapters` of 0 is base-only, None does not apply."""
        case = Case(table, model, rows, adapters or 0, density, coding, context, what)
        floor = 1e3 * nbytes / self.copy_bandwidth if unit == "ms" and nbytes else 0.0
        cells = {
            "table": table, "model": model, "rows": str(rows or ""),
            "adapters": "" if adapters is None else str(adapters), "density": _cell(density),
            "coding": coding, "context": str(context or ""), "what": what,
            "value": f"{value:.6g}", "unit": unit,
            "copy_bandwidth": f"{self.copy_bandwidth:.4g}", **self._stamp,
            "bytes": str(round(nbytes)) if nbytes else "", "floor": _cell(floor),
            "predicted": _cell(self._predicted(case)), "note": note,
        }  # fmt: skip
        self._writer.writerow(cells)
        self._file.flush()
        self.counts[table] = self.counts.get(table, 0) + 1
        print(_shown(cells), flush=True)

    def _predicted(self, case: Case) -> float:
        known = (case.table, case.what) in _PREDICTED and case.model in MODELS
        if self._rates is None or not known or (case.coding or CODINGS[0]) not in CODINGS:
            return 0.0
        return predict(case, self._rates)


def card_of(device: str) -> Card | None:
    """The data sheet of a device, by the name that its driver gives it."""
    return next((card for card in CARDS.values() if card.device in device), None)


def _rates(device: str, copy_bandwidth: float) -> Rates | None:
    card = card_of(device)
    return None if card is None else Rates.of(card, copy_bandwidth)


def _cell(value: float) -> str:
    return f"{value:.6g}" if value else ""


def _shown(cells: Mapping[str, str]) -> str:
    named = [cells["table"], cells["what"], cells["model"]]
    for key, text in (("rows", "rows"), ("adapters", "adapters"), ("context", "context")):
        named += [f"{cells[key]} {text}"] if cells[key] else []
    if cells["density"]:
        named.append(f"{100 * float(cells['density']):g} % {cells['coding']}")
    parts = [f"{cells['value']} {cells['unit']}"]
    parts += [f"{key} {cells[key]}" for key in ("floor", "predicted", "note") if cells[key]]
    return f"{', '.join(filter(None, named))}: {'; '.join(parts)}"


def open_record(path: Path) -> TextIO:
    """The file, replaced."""
    path.parent.mkdir(parents=True, exist_ok=True)
    return path.open("w", newline="")
