"""A picture for each table of a results file; where there is none, of what is predicted."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Final, cast

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.common import read_csv
from benchmarks.gpu.record import INTERPRETER
from benchmarks.roofline.cards import CARDS, Rates
from benchmarks.roofline.measured import CODINGS
from benchmarks.roofline.models import MODELS, Model
from benchmarks.roofline.packed import Coding
from benchmarks.roofline.step import Workload, resident_bytes
from benchmarks.roofline.tables import csv_lines

Line = Mapping[str, str]

_CARD, _MODEL, _CONTEXT = "H200", "llama-3.1-8b", 512
_PREFILL_ROWS = "512"
_STYLES: Final[Mapping[str, str]] = {CODINGS[0]: "-", CODINGS[1]: "--"}
_COLOURS: Final = ("tab:blue", "tab:orange", "tab:green", "tab:red", "tab:purple")
#: Inches.
_BAR_HEIGHT = 0.16


def draw(csv: Path, folder: Path) -> list[Path]:
    """The paths of what was drawn.

    Args:
        csv: of a run. If it is not there, the roofline's predictions are drawn.
        folder: made if need be.
    """
    matplotlib.use("Agg")
    lines = read_csv(csv) if csv.exists() else _predicted()
    kind, source = _kind(lines)
    folder.mkdir(parents=True, exist_ok=True)
    found = []
    for model in dict.fromkeys(line["model"] for line in lines):
        mine = [line for line in lines if line["model"] == model]
        for table in dict.fromkeys(line["table"] for line in mine):
            chosen = [line for line in mine if line["table"] == table]
            longest = _BAR_HEIGHT * len(chosen) if table not in _DRAWN else 0.0
            figure = Figure(figsize=(9, max(4.5, 1 + longest)), layout="constrained")
            figure.suptitle(f"{table}, {model or 'the card'}: {source}")
            _DRAWN.get(table, _bars)(figure, chosen)
            name = "-".join(filter(None, ("gpu", kind, model, table)))
            path = folder / f"{name}.png"
            figure.savefig(path, dpi=80)
            found.append(path)
    return found


def _kind(lines: Sequence[Line]) -> tuple[str, str]:
    """What the figures are, in a word and for a title."""
    last = lines[-1]
    if "date" not in last:
        return "predicted", f"predicted for one {last['card']}, not measured"
    if last["card"] == INTERPRETER:
        return "interpreted", "a dry run in Triton's interpreter"
    return "measured", f"measured on {last['card']}, {last['date'].split()[0]}"


def _predicted() -> list[Line]:
    """All but the steps whose adapters do not fit into the card's memory."""
    rates, model = Rates.of(CARDS[_CARD]), MODELS[_MODEL]
    lines = csv_lines(model, rates, _CONTEXT, [], _CARD)
    return [
        {**line, "value": line["predicted"]} for line in lines
        if line["table"] != "decode" or _needs(model, line) <= rates.memory
    ]  # fmt: skip


def _needs(model: Model, line: Line) -> float:
    density, adapters = float(line["density"] or 0), int(line["adapters"])
    coding = cast(Coding, line["coding"] or CODINGS[0])
    load = Workload(int(line["rows"]), adapters, density, coding, _CONTEXT)
    return resident_bytes(model, load) if adapters else model.nbytes


def _decode(figure: Figure, lines: Sequence[Line]) -> None:
    """The rate over base-only, by distinct adapters; a panel for each number of rows."""
    steps = [line for line in lines if line["what"] == "step"]
    rows = sorted({int(line["rows"]) for line in steps})
    panels = figure.subplots(1, len(rows), sharey=True, squeeze=False)[0]
    for axes, count in zip(panels, rows, strict=True):
        mine = [line for line in steps if int(line["rows"]) == count]
        base = [float(line["value"]) for line in mine if line["adapters"] == "0"]
        if not base:
            continue
        axes.set_title(f"{count} rows: {1e3 * count / base[0]:.0f} tokens/s without adapters")
        _by_density(axes, [line for line in mine if line["adapters"] != "0"], base[0])
        axes.set_xscale("log", base=2)
        counts = sorted({int(line["adapters"]) for line in mine} - {0})
        axes.set_xticks(counts, [str(count) for count in counts])
        axes.set_xlabel("distinct adapters in a step")
        axes.set_ylim(0, 1.05)
        axes.axhline(1.0, color="grey", linewidth=0.8)
    panels[0].set_ylabel("rate, of base-only")
    panels[-1].legend(fontsize=7, ncols=2)


def _by_density(axes: Axes, lines: Sequence[Line], base: float) -> None:
    """`base` over the value, a line for each density and coding, over the adapters."""
    densities = sorted({float(line["density"]) for line in lines})
    for colour, density in zip(_COLOURS, densities, strict=False):
        for coding in dict.fromkeys(line["coding"] for line in lines):
            points = sorted(
                (int(line["adapters"]), base / float(line["value"])) for line in lines
                if float(line["density"]) == density and line["coding"] == coding
            )  # fmt: skip
            if points:
                style, label = _STYLES.get(coding, ":"), f"{100 * density:g} %, {coding}"
                axes.plot(*zip(*points, strict=True), style, color=colour, marker=".", label=label)


def _over_density(figure: Figure, lines: Sequence[Line]) -> None:
    """A line for each thing and coding, over the density."""
    axes = figure.subplots()
    kinds = dict.fromkeys(line["what"] for line in lines)
    for colour, what in zip(_COLOURS, kinds, strict=False):
        for coding in dict.fromkeys(line["coding"] for line in lines):
            points = sorted(
                (100 * float(line["density"]), float(line["value"])) for line in lines
                if (line["what"], line["coding"]) == (what, coding) and line["density"]
            )  # fmt: skip
            if points:
                axes.plot(*zip(*points, strict=True), _STYLES.get(coding, ":"), color=colour,
                          marker=".", label=f"{what}, {coding}")  # fmt: skip
    axes.set_xscale("log")
    axes.set_xlabel("density, %")
    axes.set_ylabel({"B": "bytes an entry"}.get(lines[0]["unit"], lines[0]["unit"]))
    axes.set_ylim(bottom=0)
    axes.legend(fontsize=8)


def _bytes(figure: Figure, lines: Sequence[Line]) -> None:
    _over_density(figure, lines)
    figure.axes[0].axhline(2.0, color="grey", linewidth=0.8)
    figure.axes[0].annotate("a parameter of a LoRA in bf16", (0.05, 2.05), fontsize=8)


def _prefill(figure: Figure, lines: Sequence[Line]) -> None:
    known = {line["rows"] for line in lines}
    rows = _PREFILL_ROWS if _PREFILL_ROWS in known else max(known, key=int)
    _over_density(figure, [line for line in lines if line["rows"] == rows])
    figure.axes[0].set_title(f"what one adapter adds to a chunk of {rows} rows")


def _fuse(figure: Figure, lines: Sequence[Line]) -> None:
    _over_density(figure, [line for line in lines if line["unit"] == "ms"])


def _launches(figure: Figure, lines: Sequence[Line]) -> None:
    """Time over bytes, with what the copy bandwidth would take."""
    axes = figure.subplots()
    counted = [line for line in lines if line.get("bytes")]
    for colour, rows in zip(
        _COLOURS, dict.fromkeys(line["rows"] for line in counted), strict=False
    ):
        mine = [line for line in counted if line["rows"] == rows]
        axes.scatter([float(line["bytes"]) / 1e6 for line in mine],
                     [float(line["value"]) for line in mine], s=9, color=colour,
                     label=f"{rows} rows")  # fmt: skip
    sizes = sorted(float(line["bytes"]) for line in counted)
    bandwidth = float(counted[0]["copy_bandwidth"])
    ends = [sizes[0], sizes[-1]]
    axes.plot([size / 1e6 for size in ends], [1e3 * size / bandwidth for size in ends],
              color="grey", label="at the copy bandwidth")  # fmt: skip
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlabel("MB of a launch")
    axes.set_ylabel("ms")
    axes.legend(fontsize=8)


def _bars(figure: Figure, lines: Sequence[Line]) -> None:
    """A bar for each line, a panel for each unit."""
    units = list(dict.fromkeys(line["unit"] for line in lines))
    by_unit = [[line for line in lines if line["unit"] == unit] for unit in units]
    heights = [len(mine) + 2 for mine in by_unit]
    panels = figure.subplots(len(units), 1, squeeze=False, height_ratios=heights)[:, 0]
    for axes, mine in zip(panels, by_unit, strict=True):
        axes.barh(range(len(mine)), [float(line["value"]) for line in mine], color=_COLOURS[0])
        axes.set_yticks(range(len(mine)), [_name(line) for line in mine], fontsize=6)
        axes.invert_yaxis()
        axes.set_xlabel(mine[0]["unit"], fontsize=7)


def _name(line: Line) -> str:
    parts = [line["what"]]
    parts += [f"{line[key]} {key}" for key in ("rows", "adapters", "context") if line[key]]
    parts += [f"{100 * float(line['density']):g} % {line['coding']}"] if line["density"] else []
    return ", ".join(parts)


_DRAWN: Final[Mapping[str, Callable[[Figure, Sequence[Line]], None]]] = {
    "decode": _decode,
    "bytes": _bytes,
    "prefill": _prefill,
    "fuse": _fuse,
    "load": _over_density,
    "element": _launches,
    "block": _launches,
}
