"""Predicted times of a step on a card, from bytes, instructions and launches, beside measured ones.

    python -m benchmarks.roofline [--card H200] [--model llama-3.1-8b] [--measured CSV] [--csv CSV]

Nothing is run: no card, no weights. The model's parts are in `packed` (bytes of an adapter), `step`
(decode steps), `moving` (prefills, fusing, loads) and `cards` (data sheets, and the share of them
that is reached); the columns of measured files are in `measured`.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from benchmarks.common import RESULTS, aligned, markdown, replaced, write_csv
from benchmarks.roofline.cards import CARDS, Card, Rates
from benchmarks.roofline.measured import (
    Measured,
    MeasuredFileError,
    copy_bandwidth,
    read_measured,
)
from benchmarks.roofline.models import MODELS
from benchmarks.roofline.tables import (
    bytes_table,
    comparison,
    csv_lines,
    decode_table,
    moving_table,
    prefill_table,
)


def main(arguments: Sequence[str] | None = None) -> None:
    """Read the command line and print."""
    parser = _parser()
    options = parser.parse_args(arguments)
    card, model = CARDS[options.card], MODELS[options.model]
    try:
        measured = read_measured(options.measured, card, model) if options.measured.exists() else []
    except MeasuredFileError as error:
        parser.error(str(error))
    copied = options.bandwidth or copy_bandwidth(measured)
    rates = Rates.of(card, copied, options.fraction)
    text = _report(options, card, rates, copied, measured)
    if options.into is not None:
        options.into.write_text(replaced(options.into.read_text(), "roofline", text))
    else:
        print(text)
    if options.csv is not None:
        write_csv(options.csv, csv_lines(model, rates, options.context, measured, card.name))


def _report(
    options: argparse.Namespace,
    card: Card,
    rates: Rates,
    copied: float | None,
    measured: Sequence[Measured],
) -> str:
    """All that is printed."""
    model = MODELS[options.model]
    render = markdown if options.markdown or options.into else aligned
    source = "a data sheet's" if copied is None else "a measured copy's"
    given = card.bandwidth if copied is None else copied
    parts = [
        f"Predicted for {model.name} on {card.name}: {rates.bandwidth / 1e12:.2f} TB/s "
        f"({rates.bandwidth / given:.2g} of {source} {given / 1e12:.2f} TB/s), "
        f"{rates.flops / 1e12:.0f} TFLOP/s in bf16, "
        f"{rates.instructions / 1e12:.1f} T thread instructions/s, "
        f"{1e6 * rates.launch:g} µs a launch.",
        decode_table(model, rates, options.context).shown(render),
        bytes_table(model).shown(render),
        prefill_table(model, rates).shown(render),
        moving_table(model, rates, options.context).shown(render),
        comparison(measured, rates, render),
    ]
    return "\n\n".join(parts)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.roofline",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--card", choices=list(CARDS), default="H200")
    add("--model", choices=list(MODELS), default="llama-3.1-8b")
    add("--context", type=_count, default=512, help="tokens that each row looks back on")
    text = "of a copy on the card, in place of the data sheet's or the measured file's"
    add("--bandwidth", type=_rate, metavar="BYTES/S", help=text)
    text = "of the bandwidth that is reached; 0.9 of a data sheet's, 1 of a measured one"
    add("--fraction", type=_rate, help=text)
    text = "measured rows, if the file is there"
    add("--measured", type=Path, default=RESULTS / "gpu.csv", metavar="CSV", help=text)
    add("--csv", type=Path, help="write every figure to this file, too")
    add("--markdown", action="store_true", help="print tables for a document")
    add("--into", type=Path, metavar="PAGE", help="put them between the marks of a page instead")
    return parser


def _rate(text: str) -> float:
    value = float(text)
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text} is not above 0")
    return value


def _count(text: str) -> int:
    value = int(text)
    if value < 0:
        raise argparse.ArgumentTypeError(f"{text} is below 0")
    return value


if __name__ == "__main__":
    main()
