"""Measured rows beside which predictions are printed: the columns of benchmarks/results/gpu.csv.

One line a figure, each with all of these columns (`COLUMNS`); an empty cell is "does not apply".

    table           "decode", "bytes", "prefill", "fuse" or "load"; others are not compared
    model           a name of `benchmarks.roofline.models.MODELS`
    rows            of the step, or of the prefill
    adapters        distinct ones in the step: 0 is base-only. "prefill", "fuse", "load": 1
    density         share of the patched weights' elements, 0.001 for 0.1 %
    coding          of the values: "bfloat16" or "int8"
    context         "decode": tokens that each row looks back on
    what            "decode": "step". "bytes": "entry". "prefill": "gather" or "dense", what a
                    chunk's deltas add to the base. "fuse": "fuse" or "undo". "load": "load"
    value           median
    unit            "ms"; of "bytes": "B"
    card            as the driver names it
    copy_bandwidth  bytes/s that a long copy read and wrote in the same run
    driver          its version
    versions        of python, torch, triton, …
    commit, date    of the checkout and of the run

More columns may follow. A line whose table or what is not listed is left alone.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final, NamedTuple, cast

from benchmarks.common import read_csv
from benchmarks.roofline.cards import Card, Rates
from benchmarks.roofline.models import MODELS, Model
from benchmarks.roofline.moving import dense_seconds, fuse_seconds, gather_seconds, load_seconds
from benchmarks.roofline.packed import Coding, expected
from benchmarks.roofline.step import Workload, decode_step

COLUMNS: Final = (
    "table", "model", "rows", "adapters", "density", "coding", "context", "what", "value", "unit",
    "card", "copy_bandwidth", "driver", "versions", "commit", "date",
)  # fmt: skip
CODINGS: Final[tuple[Coding, ...]] = ("bfloat16", "int8")
_UNITS: Final = {
    ("decode", "step"): "ms",
    ("bytes", "entry"): "B",
    ("prefill", "gather"): "ms",
    ("prefill", "dense"): "ms",
    ("fuse", "fuse"): "ms",
    ("fuse", "undo"): "ms",
    ("load", "load"): "ms",
}


class MeasuredFileError(Exception):
    """A file of measurements does not keep to the columns."""

    def __init__(self, path: Path, line: int, detail: str) -> None:
        super().__init__(f"{path}, line {line}: {detail}")
        self.path = path
        self.line = line
        self.detail = detail


class Case(NamedTuple):
    """What a figure is of: the columns of the same names, 0 or "" where one does not apply."""

    table: str
    model: str
    rows: int
    adapters: int
    density: float
    coding: str
    context: int
    what: str

    @property
    def unit(self) -> str:
        return _UNITS[self.table, self.what]

    def __str__(self) -> str:
        parts = [f"{self.table}: {self.what}" if self.what != self.table else self.table]
        parts += [f"{self.rows} rows"] if self.rows else []
        parts += [f"{self.adapters} adapters"] if self.table == "decode" else []
        parts += [f"{100 * self.density:g} %, {self.coding}"] if self.density else []
        parts += [f"context {self.context}"] if self.context else []
        return ", ".join(parts)


@dataclass(frozen=True, slots=True)
class Measured:
    """One line of the file.

    Attributes:
        case: of what.
        value: in the case's unit.
        copy_bandwidth: bytes/s, of the same run.
        line: all of its columns.
    """

    case: Case
    value: float
    copy_bandwidth: float
    line: Mapping[str, str]


def predict(case: Case, rates: Rates) -> float:
    """The prediction for a case, in its unit."""
    model = MODELS[case.model]
    if case.table == "decode":
        coding = cast(Coding, case.coding or CODINGS[0])
        load = Workload(case.rows, case.adapters, case.density, coding, case.context)
        return 1e3 * decode_step(model, rates, load).seconds
    coding = cast(Coding, case.coding)
    if case.table == "bytes":
        return entry_bytes(model, case.density, coding)
    if case.table == "prefill":
        function = gather_seconds if case.what == "gather" else dense_seconds
        return 1e3 * function(model, rates, case.rows, case.density, coding)
    moved = fuse_seconds if case.table == "fuse" else load_seconds
    return 1e3 * moved(model, rates, case.density, coding)


def entry_bytes(model: Model, density: float, coding: Coding) -> float:
    """Bytes of an adapter that a kernel reads, over its entries."""
    found = [expected(w.rows, w.columns, density, coding) for w in model.weights]
    return sum(p.read_bytes for p in found) / sum(p.entries for p in found)


def read_measured(path: Path, card: Card, model: Model) -> list[Measured]:
    """The lines of one card and model for which there are predictions.

    Raises:
        MeasuredFileError: a column is missing, or a cell is not what it must be.
    """
    found = []
    for number, line in enumerate(read_csv(path), start=2):
        missing = [column for column in COLUMNS if line.get(column) is None]
        if missing:
            raise MeasuredFileError(path, number, f"no column {', '.join(missing)}")
        known = (line["table"], line["what"]) in _UNITS
        if known and line["model"] == model.name and card.device in line["card"]:
            found.append(_parse(path, number, line))
    return found


def copy_bandwidth(lines: Sequence[Measured]) -> float | None:
    """The median over the lines; None if there are none."""
    return statistics.median(line.copy_bandwidth for line in lines) if lines else None


def _parse(path: Path, number: int, line: Mapping[str, str]) -> Measured:
    try:
        case = Case(
            line["table"], line["model"], int(line["rows"] or 0), int(line["adapters"] or 0),
            float(line["density"] or 0), line["coding"], int(line["context"] or 0), line["what"],
        )  # fmt: skip
        value, bandwidth = float(line["value"]), float(line["copy_bandwidth"])
    except ValueError as error:
        raise MeasuredFileError(path, number, str(error)) from error
    if line["unit"] != case.unit:
        raise MeasuredFileError(path, number, f"{case.table} is in {case.unit}")
    if case.coding not in (CODINGS if case.density else (*CODINGS, "")):
        raise MeasuredFileError(path, number, f"no coding {case.coding!r}")
    if not case.density and (case.table != "decode" or case.adapters):
        raise MeasuredFileError(path, number, "adapters without a density")
    if not 0 <= case.density < 1 or min(value, bandwidth, case.rows + 1) <= 0:
        raise MeasuredFileError(path, number, "a number is out of range")
    return Measured(case, value, bandwidth, line)
