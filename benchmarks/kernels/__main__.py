"""The kernels beside the base products of SmolLM2-135M: `python -m benchmarks.kernels [--csv]`.

Every figure is milliseconds of one whole step: 30 distinct layers of four patched weights, so that
nothing stays in a cache between calls that would not stay there in the engine (a benchmark that
repeats one layer looks twice as good). Base and base + deltas alternate in one process; the added
time is the difference of their medians. `predicted` is bytes / bandwidth, the bandwidth being that
of a copy in the same run; `foreign` is the share of the machine that other processes used.

With `--threads 1` the clock is the thread's CPU time, which a busy machine disturbs less.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import torch

from benchmarks.common import RESULTS, Provenance, aligned, bind_cpus, write_csv
from benchmarks.kernels.applying import decode, prefill
from benchmarks.kernels.bench import MODEL, Bench, Line, bandwidth
from benchmarks.kernels.deltas import random_delta
from benchmarks.kernels.dense import attention, products
from benchmarks.kernels.writing import fusing, packing
from gossamer.kernels import WorkPlan, apply, bind, to_dense, warm_up

SECTIONS = {
    "products": products,
    "decode": decode,
    "prefill": prefill,
    "fusing": fusing,
    "packing": packing,
    "attention": attention,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--only", nargs="*", choices=SECTIONS, default=list(SECTIONS))
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--csv", type=Path, nargs="?", const=RESULTS / "kernels.csv")
    options = parser.parse_args()
    torch.manual_seed(0)
    torch.set_grad_enabled(False)
    bind_cpus(options.threads)
    torch.set_num_threads(options.threads)
    start = time.perf_counter()
    warm_up()
    warm = time.perf_counter() - start
    base = [[torch.randn(w.columns, w.rows) for w in MODEL.weights] for _ in range(MODEL.layers)]
    clock = time.thread_time if options.threads == 1 else time.perf_counter
    bench = Bench(base, options.rounds, bandwidth(), clock)
    print(
        f"copy {bench.bandwidth / 1e9:.1f} GB/s, {options.threads} threads, warm-up {warm:.1f} s\n"
    )
    check(bench)
    lines = [line for name in options.only for line in SECTIONS[name](bench)]
    print(aligned([*Line._fields], [[show(value) for value in line] for line in lines]))
    if options.csv:
        extra = {
            **Provenance.here().columns(),
            "threads": str(options.threads),
            "copy_gb_s": f"{bench.bandwidth / 1e9:.1f}",
        }
        named = [dict(zip(Line._fields, map(show, line), strict=True)) for line in lines]
        write_csv(options.csv, [{**line, **extra} for line in named])


def check(bench: Bench) -> None:
    """What is timed is also right: one weight against its dense difference."""
    weight = MODEL.weights[0]
    delta = random_delta("element", weight, 0.01)
    bound = bind([delta], (weight.rows, weight.columns))
    x, y = bench.inputs(16)[weight.columns], torch.zeros(16, weight.rows)
    apply(y, x, bound, WorkPlan.build([(0,)] * 16), torch.ones(16, 1, 1))
    torch.testing.assert_close(y, x @ to_dense(delta).t(), rtol=1e-4, atol=1e-4)
    assert len(weight.projections) == delta.projections


def show(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


if __name__ == "__main__":
    main()
