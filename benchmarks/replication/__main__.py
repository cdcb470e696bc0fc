"""Run what is missing, or write what there is into the pages.

    python -m benchmarks.replication run [EXPERIMENT …] [--minutes 100]
    python -m benchmarks.replication rates
    python -m benchmarks.replication report

`run` writes the pages too, when it ends. Each run is a line or two of the results file
(benchmarks/results/replication.csv), written when it has ended; what is there is not run again, so
this may be stopped at any time and started again.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import torch

from benchmarks.common import RESULTS, read_csv
from benchmarks.replication.plan import EXPERIMENTS, SEEDS, planned, rate_runs
from benchmarks.replication.report import write_pages
from benchmarks.replication.running import Runner
from gossamer.base.sources import DEFAULT_BASE, open_base


def main() -> None:
    """Read the command line and do it."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("do", choices=("run", "rates", "report"))
    parser.add_argument("experiments", nargs="*", choices=[[], *EXPERIMENTS], default=[])
    parser.add_argument("--seeds", type=int, nargs="+", default=SEEDS)
    parser.add_argument("--only", default="", metavar="TEXT", help="runs in whose name this stands")
    parser.add_argument("--minutes", type=float, help="begin no run after so many")
    parser.add_argument("--list", action="store_true", help="only say what is missing")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--base", default=DEFAULT_BASE)
    parser.add_argument("--data-dir", type=Path, default=Path.home() / ".gossamer")
    parser.add_argument("--cache", type=Path, default=Path.home() / ".cache/gossamer/replication")
    parser.add_argument("--results", type=Path, default=RESULTS / "replication.csv")
    options = parser.parse_args()
    if options.do == "report":
        for path in write_pages(read_csv(options.results)):
            print(path)
        return
    options.cache.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(options.threads)
    runner = Runner(open_base(options.base, options.data_dir), options.cache, options.results)
    runs = (
        rate_runs()
        if options.do == "rates"
        else planned(options.experiments or EXPERIMENTS, options.seeds)
    )
    missing = [run for run in runner.missing(runs) if options.only in run.key]
    began = time.monotonic()
    for index, run in enumerate(missing, start=1):
        if options.list:
            print(run.key)
            continue
        if options.minutes is not None and time.monotonic() - began > 60 * options.minutes:
            print(f"{len(missing) - index + 1} runs are left")
            break
        for line in runner.run(run):
            print(
                f"{index}/{len(missing)} {run.key}: {line['judged']} {line['accuracy']}, "
                f"loss {line['loss']}, {line['seconds']} s",
                flush=True,
            )
    if not options.list and options.results == RESULTS / "replication.csv":
        write_pages(read_csv(options.results))


if __name__ == "__main__":
    main()
