"""Measure the kernels and the engine on one card, at the shapes of real models, without weights.

    python -m benchmarks.gpu                       # all of it: under ten minutes on an H100 or H200
    python -m benchmarks.gpu --tests               # `pytest -m gpu` first
    python -m benchmarks.gpu --only decode --only entries
    python -m benchmarks.gpu --dry-run             # toy sizes, in Triton's interpreter, no card
    python -m benchmarks.gpu --plots docs/plots    # draw what was measured, or else predictions

Needs torch, transformers, triton, numpy and safetensors; `--plots` needs matplotlib and no card.
Writes benchmarks/results/gpu.csv, a line a figure, as soon as it has it. A section that fails is
reported, the others run, and the exit status is 1.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

_ROOT = Path(__file__).parents[2]
#: Where `gossamer` is, for an environment in which it is not installed.
_SOURCES = ("server", "kernels", "adapters_store")


def main(arguments: Sequence[str] | None = None) -> int:
    """Read the command line and run; the exit status."""
    options = _parser().parse_args(arguments)
    if find_spec("gossamer") is None:
        sys.path[:0] = [str(_ROOT / source) for source in _SOURCES]
    if options.plots is not None:
        from benchmarks.gpu.plots import draw

        for path in draw(options.csv, options.plots):
            print(path)
        return 0
    if options.dry_run:
        # Triton looks at it when a kernel is defined, so before anything imports one.
        os.environ["TRITON_INTERPRET"] = "1"
    from benchmarks.gpu.run import NoCardError, UnknownSectionError, run

    csv = options.csv
    if options.dry_run and csv == _parser().get_default("csv"):
        csv = Path(tempfile.mkdtemp(prefix="gossamer-gpu-")) / "gpu.csv"
    end = time.monotonic() + 60 * options.minutes
    try:
        return run(csv, options.only or (), end, dry_run=options.dry_run,
                   tests=options.tests, commit=options.commit)  # fmt: skip
    except NoCardError as error:
        print(f"{error}; --dry-run goes through everything without one", file=sys.stderr)
        return 2
    except UnknownSectionError as error:
        print(error, file=sys.stderr)
        return 2


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--only", action="append", metavar="SECTION", help="instead of all; may be repeated")
    add("--minutes", type=float, default=9.5, help="of the whole run; then no case is begun")
    add("--tests", action="store_true", help="run the tests that need a card first")
    add("--commit", help="what is measured, where the checkout cannot say it")
    add("--dry-run", action="store_true", help="toy sizes in the interpreter; a temporary file")
    add("--csv", type=Path, default=_ROOT / "benchmarks" / "results" / "gpu.csv",
        help="results file, replaced; of --plots, what is drawn")  # fmt: skip
    add("--plots", type=Path, metavar="DIR", help="draw, measure nothing")
    return parser


if __name__ == "__main__":
    sys.exit(main())
