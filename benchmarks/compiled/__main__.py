"""Compile every variant of the GPU kernels, for three cards, on a machine that has none.

    python -m benchmarks.compiled                                      # writes results/compiled.csv
    python -m benchmarks.compiled --only NAME --target sm_90
    python -m benchmarks.compiled --table tests/kernels/compiled.csv   # after a change of kernels

Prints registers, spills, and the widths of the loads from global memory as the machine code has
them. Exits with 1 if a variant does not compile, spills, lacks what it says it needs, or (--check)
takes more registers than a table says.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

from benchmarks.common import RESULTS, Provenance, aligned, read_csv, write_csv
from benchmarks.compiled.checks import drifted, table_line
from benchmarks.compiled.compiling import TARGETS
from benchmarks.compiled.pool import Job, Outcome, compile_all
from benchmarks.compiled.variants import MODULES, find_variants

_PACKAGES = ("triton", "torch", "numpy")
_PRINTED = {
    "variant": "name", "target": "target", "regs": "registers", "spills": "spills",
    "stack": "stack_bytes", "aside": "moved_aside", "shared": "shared_bytes",
    "loads in loops": "loop_loads", "all loads": "loads", "stores": "stores",
    "matrix": "matrix_products", "barriers": "inner_barriers", "code": "code_bytes",
    "s": "seconds",
}  # fmt: skip


def main() -> None:
    """Read the command line and run."""
    options = _parser().parse_args()
    variants = find_variants(options.module or MODULES)
    targets = options.target or list(TARGETS)
    jobs = [
        Job(module, name, target)
        for name, (module, _) in variants.items()
        if options.only in name
        for target in targets
    ]
    if not jobs:
        sys.exit(f"no variant has {options.only!r} in its name")
    with tempfile.TemporaryDirectory() as folder:
        outcomes = compile_all(jobs, options.processes, options.cache or Path(folder))
    compiled = [each.compiled for each in outcomes if each.compiled is not None]
    lines = [each.columns() for each in compiled]
    print(aligned(list(_PRINTED), [[line[key] for key in _PRINTED.values()] for line in lines]))
    if options.check is not None:
        _add_drift(outcomes, options.check)
    narrowed = options.only or options.module or options.target
    if options.csv is not None or not narrowed:
        provenance = Provenance.here(_PACKAGES).columns()
        path = options.csv or RESULTS / "compiled.csv"
        write_csv(path, [{**each.columns(), **provenance} for each in outcomes])
    if options.table is not None:
        write_csv(options.table, [table_line(each) for each in compiled])
    wrong = [f"{each.job.name}, {each.job.target}: {fault}"
             for each in outcomes for fault in each.faults]  # fmt: skip
    if wrong:
        sys.exit("\n".join(wrong))


def _add_drift(outcomes: list[Outcome], table: Path) -> None:
    """Adds to the outcomes where they are worse than the table."""
    compiled = [each.compiled for each in outcomes if each.compiled is not None]
    found = drifted(compiled, read_csv(table))
    for each in outcomes:
        message = found.pop((each.job.name, each.job.target), None)
        if message is not None and each.compiled is not None:
            each.faults.append(message)
    outcomes += [Outcome(Job("", *key), None, [message]) for key, message in found.items()]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.compiled",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--only", default="", metavar="NAME", help="variants with NAME in their name")
    add("--target", action="append", choices=list(TARGETS), help="not all; may be repeated")
    add("--module", action="append", help="where VARIANTS are, instead of in the kernels")
    add("--processes", type=int, default=2, help="how many to compile at a time")
    add("--cache", type=Path, help="keep what is compiled here, and compile only what is not")
    add("--csv", type=Path, help="results file, replaced; results/compiled.csv if all are compiled")
    add("--check", type=Path, metavar="CSV", help="a table to compare registers with")
    add("--table", type=Path, metavar="CSV", help="write such a table")
    return parser


if __name__ == "__main__":
    main()
