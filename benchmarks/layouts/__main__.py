"""Compare the candidates on the packed weights of one layer of Llama-3.1-8B.

    python -m benchmarks.layouts [--time] [--markdown]

Bytes an entry, with everything that a kernel reads; places that its threads go through for each
entry; and what the compiler made of the inner loop for sm_90. No card is needed. `--time` measures
too, on a CUDA device. Writes benchmarks/results/layouts.csv.
"""

from __future__ import annotations

import argparse
import itertools
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path

import triton

from benchmarks.common import RESULTS, Provenance, aligned, markdown, write_csv
from benchmarks.layouts.account import Account, account, total
from benchmarks.layouts.candidates import CANDIDATES, WIDTHS
from benchmarks.layouts.code import TARGET, InnerLoop, inner_loop
from benchmarks.layouts.entries import DENSITIES, MASKS, SHAPES, random_entries
from benchmarks.layouts.layout import Layout
from benchmarks.layouts.timing import Card, microseconds

_PACKAGES = ("triton", "torch", "numpy")
_NO_CARD = "no CUDA device: no times are measured"

Loops = dict[tuple[str, int], InnerLoop]
Line = dict[str, str]


def main() -> None:
    """Read the command line and run."""
    options = _parser().parse_args()
    card = Card.here() if options.time else None
    if options.time and card is None:
        print(f"{_NO_CARD}\n")
    with tempfile.TemporaryDirectory() as cache:
        triton.knobs.cache.dir = cache
        loops = {(layout.name, width): inner_loop(layout, width)
                 for layout in CANDIDATES for width in WIDTHS}  # fmt: skip
        lines = []
        for mask, density in itertools.product(MASKS, options.density or DENSITIES):
            lines += _measure(mask, density, loops, card)
    provenance = Provenance.here(_PACKAGES).columns()
    card_columns = {"card": card.name if card else _NO_CARD,
                    "copy_gbps": f"{card.bandwidth / 1e9:.0f}" if card else ""}  # fmt: skip
    write_csv(options.csv, [{**line, **card_columns, **provenance} for line in lines])
    _print(lines, loops, markdown if options.markdown else aligned)
    print(f"\nwritten to {options.csv}")


def _measure(mask: str, density: float, loops: Loops, card: Card | None) -> list[Line]:
    """One line for each candidate and weight, and one for the layer."""
    accounts: dict[str, dict[str, Account]] = {layout.name: {} for layout in CANDIDATES}
    times: dict[tuple[str, str, int], float] = {}
    for seed, (weight, shape) in enumerate(SHAPES.items()):
        entries = random_entries(shape, density, mask, seed)
        for layout in CANDIDATES:
            accounts[layout.name][weight], packed = account(layout, entries)
            for width in WIDTHS if card else ():
                times[layout.name, weight, width] = microseconds(layout, packed, entries, width)
    lines = []
    for layout in CANDIDATES:
        weights = accounts[layout.name]
        for weight, found in {**weights, "layer": total(weights.values())}.items():
            some = list(weights) if weight == "layer" else [weight]
            taken = {width: sum(times[layout.name, each, width] for each in some)
                     for width in WIDTHS if card}  # fmt: skip
            head = {"mask": mask, "density": f"{density:g}", "layout": layout.name}
            head["weight"] = weight
            lines.append({**head, **_columns(layout, found, loops, taken)})
    return lines


def _columns(layout: Layout, found: Account, loops: Loops, taken: dict[int, float]) -> Line:
    columns = {
        "nnz": str(found.nnz),
        "bytes_per_nnz": f"{found.nbytes / found.nnz:.3f}",
        "bytes_per_nnz_int8": f"{found.nbytes8 / found.nnz:.3f}",
        "slots_per_nnz": f"{found.slots / found.nnz:.3f}",
        "programs": str(found.programs),
        "imbalance": f"{found.imbalance:.2f}",
    }
    for width in WIDTHS:
        loop = loops[layout.name, width]
        per_nnz = loop.per_slot * found.slots / found.nnz
        columns[f"instructions_per_nnz_{width}"] = f"{per_nnz:.1f}"
        columns |= {f"{key}_{width}": _cell(value) for key, value in asdict(loop).items()}
        columns[f"microseconds_{width}"] = f"{taken[width]:.2f}" if taken else ""
        columns[f"gbps_{width}"] = f"{found.nbytes / taken[width] / 1e3:.0f}" if taken else ""
    return columns


def _cell(value: object) -> str:
    return f"{value:.1f}" if isinstance(value, float) else str(value)


_Render = Callable[[Sequence[str], Sequence[Sequence[str]]], str]


def _print(lines: list[Line], loops: Loops, render: _Render) -> None:
    layer = [line for line in lines if line["weight"] == "layer"]
    columns = list(dict.fromkeys((line["mask"], line["density"]) for line in layer))
    head = ["layout", *(f"{mask} {100 * float(density):g} %" for mask, density in columns)]
    shown = {
        "bytes an entry, 16-bit values": "bytes_per_nnz",
        "bytes an entry, 8-bit values with a scale a row": "bytes_per_nnz_int8",
        "places gone through for each entry": "slots_per_nnz",
        "rounds of the longest program over the mean": "imbalance",
    }
    for width in WIDTHS:
        shown[f"instructions of a thread for each entry, T = {width}"] = (
            f"instructions_per_nnz_{width}"
        )
        if layer[0][f"microseconds_{width}"]:
            shown[f"microseconds a layer, T = {width}"] = f"microseconds_{width}"
            shown[f"GB/s, T = {width}"] = f"gbps_{width}"
    for title, key in shown.items():
        found = {(line["layout"], line["mask"], line["density"]): line[key] for line in layer}
        cells = [[layout.name, *(found[layout.name, *each] for each in columns)]
                 for layout in CANDIDATES]  # fmt: skip
        print(f"{title}\n\n{render(head, cells)}\n")
    print(f"the inner loop for {TARGET}\n")
    head = ["layout", "T", "registers", "stack", "loads of one round", "barriers",
            "a place", "unrolled"]  # fmt: skip
    cells = [[name, str(width), str(loop.registers), str(loop.stack_bytes), loop.loads,
              f"{loop.barriers:g}", f"{loop.per_slot:.1f}", str(loop.unrolled)]
             for (name, width), loop in loops.items()]  # fmt: skip
    print(render(head, cells))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.layouts",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--time", action="store_true", help="also measure on a CUDA device")
    add("--density", type=float, action="append", help="instead of all; may be repeated")
    add("--markdown", action="store_true", help="print tables for a document")
    add("--csv", type=Path, default=RESULTS / "layouts.csv", help="results file, replaced")
    return parser


if __name__ == "__main__":
    main()
