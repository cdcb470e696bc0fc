"""From measurements to figures: medians, ratios, predictions, targets, the CSV and the tables."""

from __future__ import annotations

import math
import operator
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from benchmarks.common import Provenance, aligned, markdown

#: Above this share of foreign work a timing says little.
QUIET = 0.05


@dataclass(frozen=True)
class Goal:
    """What a figure's ratio should be: `Goal(">=", 0.84)`."""

    relation: str
    bound: float

    def met(self, ratio: float) -> bool:
        """Whether a ratio satisfies it."""
        compare = operator.ge if self.relation == ">=" else operator.le
        return bool(compare(ratio, self.bound))

    def __str__(self) -> str:
        return f"{self.relation} {self.bound:g}"


@dataclass(frozen=True)
class Sample:
    """One round's measurement.

    Attributes:
        value: in the figure's unit.
        ratio: against what it is compared with, from the same round; nan when with nothing.
        foreign: share of the machine that other processes used meanwhile.
        step: seconds of a decode step, where there is one.
    """

    value: float
    ratio: float = math.nan
    foreign: float = math.nan
    step: float = math.nan


@dataclass
class Figure:
    """What the rounds say about one thing.

    Attributes:
        group: of figures that one table shows.
        name: what was measured.
        unit: of the value.
        against: what the ratio compares with; empty when with nothing.
        predicted: the ratio that counting bytes gives; nan where no such model applies.
        goals: for the ratio.
    """

    group: str
    name: str
    unit: str
    against: str = ""
    predicted: float = math.nan
    goal: Goal | None = None
    samples: list[Sample] = field(default_factory=list)

    def line(self, provenance: Provenance, extra: Mapping[str, str]) -> dict[str, str]:
        """As a line of the results file."""
        ratio = _median([s.ratio for s in self.samples])
        met = "" if self.goal is None else "met" if self.goal.met(ratio) else "missed"
        return {
            "group": self.group,
            "name": self.name,
            "value": _number(_median([s.value for s in self.samples])),
            "unit": self.unit,
            "step_ms": _number(1e3 * _median([s.step for s in self.samples])),
            "ratio": _number(ratio, 3),
            "against": self.against,
            "predicted_ratio": _number(self.predicted, 3),
            "target": "" if self.goal is None else str(self.goal),
            "result": met,
            "foreign": _number(_median([s.foreign for s in self.samples]), 2),
            "rounds": ";".join(_number(s.value) for s in self.samples),
            "ratios": ";".join(_number(s.ratio, 3) for s in self.samples),
            **extra,
            **provenance.columns(),
        }


HEAD = ("", "", "decode step", "ratio", "bytes predict", "target", "")


def table(lines: Sequence[Mapping[str, str]], *, as_markdown: bool) -> str:
    """The lines of a results file as tables, with the machine and the commit below them."""
    parts = []
    for group in dict.fromkeys(line["group"] for line in lines):
        chosen = [_cells(line) for line in lines if line["group"] == group]
        head = (group, *HEAD[1:])
        parts.append(markdown(head, chosen) if as_markdown else aligned(head, chosen))
    last = lines[-1]
    parts.append(
        f"{last['machine']}, {last['threads']} threads, reads {last['read_gbps']} GB/s; "
        f"{last['versions']}; commit {last['commit']}; {last['date']} UTC. "
        f"Medians of {last['rounds'].count(';') + 1} rounds."
    )
    shares = [float(line["foreign"] or 0) for line in lines]
    disturbed = sum(share > QUIET for share in shares)
    if disturbed:
        parts.append(
            f"Not a quiet machine: in {disturbed} of {len(lines)} figures other processes used "
            f"more than {QUIET:.0%} of it, up to {max(shares):.0%}."
        )
    return "\n\n".join(parts)


def _cells(line: Mapping[str, str]) -> tuple[str, ...]:
    ratio = f"{line['ratio']} of {line['against']}" if line["ratio"] else ""
    step = f"{line['step_ms']} ms" if line["step_ms"] else ""
    return (
        line["name"],
        f"{line['value']} {line['unit']}",
        step,
        ratio,
        line["predicted_ratio"],
        line["target"],
        line["result"],
    )


def _median(values: Sequence[float]) -> float:
    known = [value for value in values if not math.isnan(value)]
    return statistics.median(known) if known else math.nan


def _number(value: float, digits: int = 1) -> str:
    return "" if math.isnan(value) else f"{value:.{digits}f}"
