"""The results file → tables and plots of docs/replication.md, and the README's table of gains."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.figure import Figure

from benchmarks.common import ROOT, markdown, replaced
from benchmarks.replication.intervals import BySeed, Interval, difference, interval
from benchmarks.replication.plan import (
    BASE,
    CHAINS,
    CHOICE,
    FULL,
    LORA_8,
    LOTA_90,
    LOTA_99,
    LOTA_99_STAR,
    LOTTO_90,
    MASKS,
    MCS_MAIN,
    PAIRS,
    SCORES,
    SPARTA_MAIN,
    TASKS,
    TRIED,
    Arm,
    lora,
    sparta,
    tried,
)
from benchmarks.replication.running import Line, unpacked

PAGE = ROOT / "docs" / "replication.md"
README = ROOT / "README.md"
PLOTS = ROOT / "docs" / "plots"
Row = Sequence[str]

#: Share of the machine that others may have used while a run was timed.
QUIET = 0.1
#: Where nothing has been run yet.
MISSING = "not run yet"


class Results:
    """The lines of the results file, by what they are about."""

    def __init__(self, lines: Iterable[Line]) -> None:
        self.lines = list(lines)

    def of(self, arm: Arm, task: str, *, after: Arm | None = None, judged: str = "") -> list[Line]:
        """An arm's lines on a task, by seed; after another arm, on the other task, if there is
        one; judged on the task itself or on another one."""
        first = "" if after is None else f"{after.name}@{_other(task)}#"
        return [
            line for line in self.lines
            if line["arm"] == arm.name and line["task"] == task and line["seed"] != "0"
            and line["judged"] == (judged or task)
            and (line["after"].startswith(first) if first else not line["after"])
        ]  # fmt: skip

    def timed(self, arm: Arm, task: str, *, after: Arm | None = None) -> list[Line]:
        """An arm's lines, and those of its other learning rates: they take as long."""
        other_rates = f"{arm.name}~{arm.settings['optimizer']}-"
        return [
            *self.of(arm, task, after=after),
            *(
                line for line in self.lines
                if after is None and line["arm"].startswith(other_rates) and line["task"] == task
            ),
        ]  # fmt: skip

    def right(self, arm: Arm, task: str, *, after: Arm | None = None, judged: str = "") -> BySeed:
        """Seed → bool per held-out example."""
        found = self.of(arm, task, after=after, judged=judged)
        return {int(line["seed"]): unpacked(line) for line in found}


def write_pages(lines: Sequence[Line]) -> list[Path]:
    """Put every table into its page, and draw the plots; the paths of what was written."""
    results = Results(lines)
    PAGE.write_text(page_of(results, PAGE.read_text()))
    README.write_text(replaced(README.read_text(), "gains", gains(results)))
    return [PAGE, README, *draw(results)]


def page_of(results: Results, page: str) -> str:
    """The page with these results' tables in it, and links to the plots of those that have any."""
    for name, make in TABLES.items():
        table = make(results)
        if name in PLOTTED and any(_panels(results, name).values()):
            table += f"\n\n![{name}](plots/replication-{name}.png)"
        page = replaced(page, f"replication {name}", table)
    return page


# -- tables


def gains(results: Results) -> str:
    """Each method against the base, on both tasks."""
    rows = []
    for title, arm in (
        ("SpaRTA, 0.9 %, v and o", SPARTA_MAIN), ("LoTA, 10 %", LOTA_90),
        ("LoTTO, 10 %, after LoTA on the other task", LOTTO_90),
        ("MCS, 10 % of q, k, v, sign −", MCS_MAIN),
    ):  # fmt: skip
        cells = [title]
        for task in TASKS:
            after = LOTA_90 if arm is LOTTO_90 else None
            cells.append(_seeds(results.right(arm, task, after=after)))
            cells.append(_minutes(results.timed(arm, task, after=after)))
        rows.append(cells)
    base = [
        ["base, free", *_base(results, BASE)],
        ["base, best of the choices", *_base(results, CHOICE)],
    ]
    head = ["", *(cell for task in TASKS for cell in (task, "minutes"))]
    return markdown(head, [*base, *rows])


def _base(results: Results, arm: Arm) -> list[str]:
    return [cell for task in TASKS for cell in (_seeds(results.right(arm, task)), "")]


def _seeds(right: BySeed) -> str:
    """The mean, and that of each seed."""
    if not right:
        return MISSING
    found = interval(right)
    each = " ".join(f"{value:.2f}" for value in found.seeds.values())
    return f"**{found.mean:.2f}** ({each})"


def _minutes(lines: Sequence[Line]) -> str:
    """The median of the training times, of runs that had the machine for themselves."""
    found = [float(line["seconds"]) for line in lines if float(line["foreign"]) < QUIET]
    return f"{np.median(found) / 60:.1f}" if found else "–"


def forgetting(results: Results) -> str:
    """What is left of the first task after the second."""
    rows = []
    for first in TASKS:
        second = _other(first)
        for one, other in CHAINS:
            before = results.right(one, first)
            left = results.right(other, second, after=one, judged=first)
            gained = results.right(other, second, after=one)
            alone = results.right(one, second)
            rows.append([
                f"{first}, then {second}", f"{one.name}, then {other.name}", _mean(before),
                _mean(left), _against(left, before), _mean(gained), _against(gained, alone),
            ])  # fmt: skip
    head = ["tasks", "arms", "first task", "after the second", "change", "second task",
            "against alone"]  # fmt: skip
    return markdown(head, rows)


def _versus(reference: Arm, arms: Sequence[Arm]) -> Callable[[Results], str]:
    """A table of arms, each against one of them."""

    def table(results: Results) -> str:
        rows = []
        for arm in arms:
            cells = [arm.name]
            for task in TASKS:
                right = results.right(arm, task)
                versus = "" if arm is reference else _against(right, results.right(reference, task))
                cells += [_mean(right), versus]
            rows.append([*cells, _values(results, arm)])
        against = f"against {reference.name}"
        head = ["arm", *(cell for task in TASKS for cell in (task, against)), "values trained"]
        return markdown(head, rows)

    return table


def pairs(results: Results) -> str:
    """SpaRTA and LoRA with as many parameters."""
    rows = []
    for rank, targets in PAIRS:
        ours, theirs = sparta(rank, targets), lora(rank, targets)
        cells = [targets, _values(results, ours)]
        for task in TASKS:
            one, other = results.right(ours, task), results.right(theirs, task)
            cells += [_mean(one), _mean(other), _against(one, other)]
        rows.append(cells)
    head = ["targets", "values trained", *(
        cell for task in TASKS for cell in (f"{task}, SpaRTA", "LoRA", "difference")
    )]  # fmt: skip
    return markdown(head, rows)


def rates(results: Results) -> str:
    """What was tried on seed 0."""
    rows = []
    for arm, optimizer, values in TRIED:
        for rate in values:
            name = tried(arm, optimizer, rate).name
            cells = [arm.name, optimizer, f"{rate:g}"]
            for task in TASKS:
                found = [
                    line for line in results.lines if line["arm"] == name and line["task"] == task
                ]
                cells += [found[0]["accuracy"], found[0]["loss"]] if found else [MISSING, ""]
            rows.append(cells)
    head = ["arm", "optimiser", "rate", *(cell for task in TASKS for cell in (task, "loss"))]
    return markdown(head, rows)


def _mean(right: BySeed) -> str:
    if not right:
        return MISSING
    found = interval(right)
    return f"{found.mean:.3f} [{found.low:.3f}, {found.high:.3f}], {len(right)} seeds"


def _against(one: BySeed, other: BySeed) -> str:
    """The difference with its interval; bold where it is not chance."""
    if not set(one) & set(other):
        return ""
    found: Interval = difference(one, other)
    text = f"{found.mean:+.3f} [{found.low:+.3f}, {found.high:+.3f}]"
    return f"**{text}**" if found.excludes_zero else text


def _values(results: Results, arm: Arm) -> str:
    found = {int(line["trained"]) for task in TASKS for line in results.of(arm, task)}
    return ", ".join(f"{value:,}" for value in sorted(found))


def _other(task: str) -> str:
    return TASKS[1 - TASKS.index(task)]


#: Name of the marks in the page → what stands between them.
TABLES: Mapping[str, Callable[[Results], str]] = {
    "gains": gains,
    "forgetting": forgetting,
    "sparsity": _versus(FULL, (FULL, LORA_8, LOTA_90, LOTA_99, LOTA_99_STAR)),
    "masks": _versus(LOTA_90, (LOTA_90, *MASKS)),
    "scores": _versus(MCS_MAIN, SCORES),
    "sparta": pairs,
    "rates": rates,
}


# -- plots


#: Tables that have a plot of their arms.
PLOTTED: Mapping[str, Sequence[Arm]] = {
    "forgetting": (),
    "sparsity": (FULL, LORA_8, LOTA_90, LOTA_99, LOTA_99_STAR),
    "masks": (LOTA_90, *MASKS),
    "scores": SCORES,
    "sparta": tuple(make(rank, targets) for rank, targets in PAIRS for make in (sparta, lora)),
}


def draw(results: Results, folder: Path = PLOTS) -> list[Path]:
    """Every arm's accuracy, and what is forgotten; only of what has been run."""
    matplotlib.use("Agg")
    folder.mkdir(parents=True, exist_ok=True)
    made = [_bars(_panels(results, name), name, folder) for name in PLOTTED]
    return [path for path in made if path is not None]


def _panels(results: Results, name: str) -> dict[str, dict[str, BySeed]]:
    """By panel and bar: what is drawn."""
    if name != "forgetting":
        arms = PLOTTED[name]
        return {
            task: {arm.name: right for arm in arms if (right := results.right(arm, task))}
            for task in TASKS
        }
    chains: dict[str, dict[str, BySeed]] = {}
    for first in TASKS:
        found = chains.setdefault(f"{first}, before and after {_other(first)}", {})
        for one, other in CHAINS:
            if left := results.right(other, _other(first), after=one, judged=first):
                found[f"{one.name}, then {other.name}: before"] = results.right(one, first)
                found[f"{one.name}, then {other.name}: after"] = left
    return chains


def _bars(panels: Mapping[str, Mapping[str, BySeed]], name: str, folder: Path) -> Path | None:
    """Accuracies with their intervals, the seeds as points."""
    if not any(panels.values()):
        return None
    longest = max(map(len, panels.values()))
    figure = Figure(figsize=(9, 1 + 0.28 * longest), layout="constrained")
    axes = figure.subplots(1, len(panels), squeeze=False)[0]
    for panel, (title, bars) in zip(axes, panels.items(), strict=True):
        for place, right in enumerate(bars.values()):
            found = interval(right)
            spread = [[found.mean - found.low], [found.high - found.mean]]
            panel.barh(place, found.mean, color="#9ab8d6", xerr=spread, ecolor="#30506f")
            panel.plot(list(found.seeds.values()), [place] * len(found.seeds), "k.", markersize=4)
        panel.set_yticks(range(len(bars)), list(bars), fontsize=8)
        panel.invert_yaxis()
        panel.set_xlim(0, 1)
        panel.set_title(title, fontsize=9)
        panel.set_xlabel("exact match on held-out examples", fontsize=8)
    path = folder / f"replication-{name}.png"
    figure.savefig(path, dpi=90)
    return path
