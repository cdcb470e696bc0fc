"""The tables that are printed, and the same figures as lines of a CSV file."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Final, NamedTuple

from benchmarks.roofline.cards import Rates
from benchmarks.roofline.measured import CODINGS, Case, Measured, entry_bytes, predict
from benchmarks.roofline.models import BYTES, Model
from benchmarks.roofline.moving import (
    MOST_ROWS,
    ScratchRule,
    crossover,
    dense_seconds,
    fuse_seconds,
    gather_seconds,
    load_seconds,
)
from benchmarks.roofline.packed import FORM_NAMES, block_bytes, expected
from benchmarks.roofline.step import Step, Workload, adapter_bytes, decode_step, resident_bytes

ROWS: Final = (16, 64)
ADAPTERS: Final = (1, 8, 64, 256)
STEP_DENSITIES: Final = (0.0005, 0.001, 0.006, 0.1)
DENSITIES: Final = (0.0005, 0.001, 0.006, 0.01, 0.1)
PREFILL_DENSITIES: Final = (0.006, 0.01, 0.02, 0.05, 0.1)
PREFILL_ROWS: Final = 512
BLOCK: Final = 16
#: Models of the size that the targets are for.
TARGET_MODELS: Final = ("llama-3.1-8b", "mistral-7b")
#: Ratio to base-only, by adapters and density.
TARGETS: Final = {(8, 0.001): 0.95, (64, 0.001): 0.85, (8, 0.1): 0.5}
#: Milliseconds for fusing and undoing, by density.
FUSE_TARGETS: Final = {0.006: 2.0}

Render = Callable[[Sequence[str], Sequence[Sequence[str]]], str]


class Table(NamedTuple):
    """A title, what to know, and cells."""

    title: str
    note: str
    head: Sequence[str]
    lines: Sequence[Sequence[str]]

    def shown(self, render: Render) -> str:
        """As text."""
        return f"Predicted: {self.title}\n\n{render(self.head, self.lines)}\n\n{self.note}"


def decode_table(model: Model, rates: Rates, context: int) -> Table:
    """Decode steps over rows, adapters, densities and codings."""
    lines, has_targets = [], model.name in TARGET_MODELS
    for rows in ROWS:
        base = decode_step(model, rates, Workload(rows, 0, 0.0, CODINGS[0], context))
        alone = ("", f"{1e3 * base.seconds:.2f}", f"{rows / base.seconds:.0f}", "1", *[""] * 3)
        lines.append([str(rows), "0", *alone, ""])
        for adapters, density in itertools.product(ADAPTERS, STEP_DENSITIES):
            steps = [_fitting(model, rates, Workload(rows, adapters, density, coding, context))
                     for coding in CODINGS]  # fmt: skip
            cells = [cell for step in steps for cell in _step_cells(step, base, rows)]
            ratios = [base.seconds / step.seconds if step else 0.0 for step in steps]
            goal = TARGETS.get((adapters, density)) if has_targets else None
            lines.append([str(rows), str(adapters), _percent(density), *cells, _goal(goal, ratios)])
    cached = replace(rates, handed_on=0.0)
    loads = [Workload(rows, 8, 0.001, CODINGS[0], context) for rows in ROWS]
    ratios = [_ratio(model, cached, load) for load in loads]
    note = (
        f"Each row looks back on {context} tokens. Launches take {1e3 * base.launches:.2f} ms of a "
        "base-only step. `of base` is the base-only step over this one. "
        "More adapters than rows: every row runs a mix of adapters / rows. `*`: some weights' "
        "deltas wait for instructions and not for memory. `-`: not in the card's memory at once. "
        "What kernels hand on to each other is counted as going through the memory; if the cache "
        "held all of it, 8 adapters of 0.1 % would be at "
        + " and ".join(f"{ratio:.3f}" for ratio in ratios)
        + f" of base-only with {' and '.join(map(str, ROWS))} rows."
    )
    head = ["rows", "adapters", "density"]
    for coding in CODINGS:
        head += [f"{coding} ms", "tok/s", "of base"]
    return Table("decode steps", note, [*head, "target"], lines)


def bytes_table(model: Model) -> Table:
    """Bytes of an adapter by density and coding, beside a LoRA's."""
    lines = []
    for density in DENSITIES:
        nnz = model.elements * density
        cells = [_percent(density), f"{nnz / 1e6:.1f} M"]
        for coding in CODINGS:
            forms = {expected(w.rows, w.columns, density, coding).form for w in model.weights}
            each = entry_bytes(model, density, coding)
            names = " ".join(FORM_NAMES[form] for form in sorted(forms))
            cells += [names, f"{each:.2f}", f"{each * nnz / 1e6:.0f}"]
        tiles = sum(block_bytes(w.rows, w.columns, density, BLOCK) for w in model.weights)
        cells.append(f"{model.layers * tiles / nnz:.2f}")
        adds = entry_bytes(model, density, CODINGS[0]) * nnz / (BYTES * model.elements)
        rank = nnz / model.lora_parameters
        cells += [f"{100 * adds:.1f} %", f"{rank:.1f}", f"{BYTES * nnz / 1e6:.0f}"]
        lines.append(cells)
    note = (
        "All metadata counted. `adds`: a distinct adapter in bfloat16, over the base's weights. "
        "The LoRA has as many parameters, in bf16, on every projection: rank 16 is "
        f"{16 * model.lora_parameters / 1e6:.1f} M."
    )
    head = ["density", "entries"]
    for coding in CODINGS:
        head += [f"{coding} as", "B an entry", "MB"]
    head += [f"{BLOCK} × {BLOCK} blocks, B", "adds", "LoRA rank", "LoRA MB"]
    return Table("bytes of an adapter", note, head, lines)


def prefill_table(model: Model, rates: Rates) -> Table:
    """Gathering against the dense scratch, and the rule to choose by."""
    lines, rules = [], []
    for coding in CODINGS:
        for density in PREFILL_DENSITIES:
            arguments = (model, rates, PREFILL_ROWS, density, coding)
            rows = crossover(model, rates, density, coding)
            lines.append([
                _percent(density), coding, f"{1e3 * gather_seconds(*arguments):.2f}",
                f"{1e3 * dense_seconds(*arguments):.2f}",
                str(rows) if rows is not None else f"over {MOST_ROWS}",
            ])  # fmt: skip
        rule = ScratchRule.of(model, rates, PREFILL_DENSITIES, coding)
        if rule is not None:
            rules.append(f"{coding}: density >= {rule.density:g} and rows × density >= "
                         f"{rule.terms:.1f}")  # fmt: skip
    base = 2 * PREFILL_ROWS * model.elements / rates.flops
    chosen = "; ".join(rules) if rules else "never"
    note = (
        f"One adapter on all rows; what it adds to the base's own products, which take "
        f"{1e3 * base:.1f} ms for {PREFILL_ROWS} rows. To dispatch on, the scratch where {chosen}."
    )
    head = ["density", "coding", f"{PREFILL_ROWS} rows, gathered, ms", "dense scratch, ms",
            "scratch from rows"]  # fmt: skip
    return Table("prefills, entries gathered or a dense scratch of Δ", note, head, lines)


def moving_table(model: Model, rates: Rates, context: int) -> Table:
    """Fusing and loading, against a step."""
    step = decode_step(model, rates, Workload(ROWS[0], 0, 0.0, CODINGS[0], context)).seconds
    lines = []
    for coding in CODINGS:
        for density in DENSITIES:
            fuse = 1e3 * fuse_seconds(model, rates, density, coding)
            load = load_seconds(model, rates, density, coding)
            target = FUSE_TARGETS.get(density) if model.name in TARGET_MODELS else None
            met = "" if target is None else f"<= {target:g}, {_met(2 * fuse <= target)}"
            lines.append([
                _percent(density), coding, f"{model.elements * density / 1e6:.1f} M",
                f"{fuse:.2f}", f"{2 * fuse:.2f}", met,
                f"{adapter_bytes(model, density, coding) / 1e6:.0f}", f"{1e3 * load:.2f}",
                f"{load / step:.2f}",
            ])  # fmt: skip
    note = (
        "Fusing and undoing move the same bytes. The load is one copy from pinned memory, at "
        f"{rates.host / 1e9:.0f} GB/s; a step is that of {ROWS[0]} rows without adapters, "
        f"{1e3 * step:.2f} ms."
    )
    head = ["density", "coding", "entries", "fuse ms", "fuse + undo ms", "target", "MB", "load ms",
            "in steps"]  # fmt: skip
    return Table("fusing, and cold loads", note, head, lines)


def comparison(lines: Sequence[Measured], rates: Rates, render: Render) -> str:
    """Predicted and measured, side by side; the gap is measured / predicted - 1."""
    if not lines:
        return "No measured rows: every figure above is predicted."
    cells = []
    for line in lines:
        predicted = predict(line.case, rates)
        unit = line.case.unit
        cells.append([
            str(line.case), f"{predicted:.3g} {unit}", f"{line.value:.3g} {unit}",
            f"{line.value / predicted - 1:+.0%}",
        ])  # fmt: skip
    head = ["", "predicted", "measured", "gap"]
    last = lines[-1].line
    where = f"{last['card']}, driver {last['driver']}; {last['versions']}"
    stamp = f"commit {last['commit']}; {last['date']}"
    return f"Predicted and measured\n\n{render(head, cells)}\n\nMeasured on {where}; {stamp}."


def cases(model: Model, context: int) -> list[Case]:
    """What the tables hold, as cases."""
    name = model.name
    found = [Case("decode", name, rows, 0, 0.0, "", context, "step") for rows in ROWS]
    for rows, adapters, density, coding in itertools.product(
        ROWS, ADAPTERS, STEP_DENSITIES, CODINGS
    ):
        found.append(Case("decode", name, rows, adapters, density, coding, context, "step"))
    for density, coding in itertools.product(DENSITIES, CODINGS):
        found.append(Case("bytes", name, 0, 0, density, coding, 0, "entry"))
        for table, what in (("fuse", "fuse"), ("fuse", "undo"), ("load", "load")):
            found.append(Case(table, name, 0, 1, density, coding, 0, what))
    for density, coding, what in itertools.product(PREFILL_DENSITIES, CODINGS, ("gather", "dense")):
        found.append(Case("prefill", name, PREFILL_ROWS, 1, density, coding, 0, what))
    return found


def csv_lines(
    model: Model, rates: Rates, context: int, measured: Sequence[Measured], card: str
) -> list[dict[str, str]]:
    """A line for each case: its columns, predicted, measured, gap."""
    values = {line.case: line.value for line in measured}
    lines = []
    for case in dict.fromkeys([*cases(model, context), *values]):
        predicted, found = predict(case, rates), values.get(case)
        line = {field: str(value) if value else "" for field, value in case._asdict().items()}
        line |= {"adapters": str(case.adapters), "unit": case.unit, "card": card}
        line["predicted"] = f"{predicted:.6g}"
        line["measured"] = "" if found is None else f"{found:.6g}"
        line["gap"] = "" if found is None else f"{found / predicted - 1:.3f}"
        lines.append(line)
    return lines


def _fitting(model: Model, rates: Rates, load: Workload) -> Step | None:
    """The step, if all that it needs is in memory at once."""
    if resident_bytes(model, load) > rates.memory:
        return None
    return decode_step(model, rates, load)


def _ratio(model: Model, rates: Rates, load: Workload) -> float:
    """Base-only over this step."""
    base = decode_step(model, rates, replace(load, adapters=0))
    return base.seconds / decode_step(model, rates, load).seconds


def _step_cells(step: Step | None, base: Step, rows: int) -> list[str]:
    if step is None:
        return ["-"] * 3
    mark = "*" if step.limited else ""
    ratio = f"{base.seconds / step.seconds:.3f}{mark}"
    return [f"{1e3 * step.seconds:.2f}", f"{rows / step.seconds:.0f}", ratio]


def _goal(target: float | None, ratios: Sequence[float]) -> str:
    if target is None:
        return ""
    reached = [coding for coding, ratio in zip(CODINGS, ratios, strict=True) if ratio >= target]
    who = _met(bool(reached)) if len(reached) in (0, len(CODINGS)) else f"met by {reached[0]}"
    return f">= {target:g}, {who}"


def _met(is_met: bool) -> str:
    return "met" if is_met else "missed"


def _percent(density: float) -> str:
    return f"{100 * density:g} %"
