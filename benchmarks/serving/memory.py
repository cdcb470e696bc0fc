"""The resident set of a process that holds a hundred adapters.

`python -m benchmarks.serving.memory`, in a process of its own, so that nothing else's pages count.
"""

from __future__ import annotations

import gc
import json
import subprocess
import sys
from pathlib import Path

from benchmarks.common import ROOT
from benchmarks.serving.adapters import Recipe, mix
from benchmarks.serving.engine import Bench
from benchmarks.serving.figures import Figure, Goal, Sample
from gossamer.base.sources import open_base

ADAPTERS = 100
DENSITY = 0.005
#: Adapters loaded before the first reading: the loader's own buffers and the allocator's slack.
BEFORE = 4
#: Tokens of the prompts: less than a KV page, so that no request leaves a page to the prefix cache
#: and the growth is the adapters'.
SHORT = 8


def measure(spec: str, data: Path) -> dict[str, int]:
    """Growth of the resident set, and the bytes that the engine says its adapters take."""
    bench = Bench(open_base(spec, data))
    try:
        _load(bench, BEFORE, seed=5000)
        start, held = _resident_set(), sum(bench.engine.resident().values())
        _load(bench, ADAPTERS, seed=6000)
        grown = _resident_set() - start
        packed = sum(bench.engine.resident().values()) - held
        return {"grown": grown, "packed": packed, "base": start}
    finally:
        bench.close()


def figure(spec: str, data: Path) -> Figure:
    """The measurement of a subprocess, as a figure."""
    command = [sys.executable, "-m", __spec__.name, spec, str(data)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    found = json.loads(done.stdout.splitlines()[-1])
    base = f"the base's {_mib(found['base']):.0f} MiB"
    result = Figure(
        "Memory",
        f"{ADAPTERS} resident adapters of {DENSITY:.1%}, over {base}",
        "MiB",
        "their packed bytes",
        predicted=1.0,
        goal=Goal("<=", 1.15),
    )
    result.samples.append(Sample(_mib(found["grown"]), found["grown"] / found["packed"]))
    return result


def _load(bench: Bench, count: int, seed: int) -> None:
    """Serve one token from each of `count` adapters, one after the other."""
    for i in range(count):
        name = bench.library.add(Recipe("element", DENSITY, seed + i))
        bench.first_token(bench.prompts[0][:SHORT], mix((name, 1.0)))


def _resident_set() -> int:
    gc.collect()
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * 4096


def _mib(nbytes: int) -> float:
    return nbytes / 2**20


if __name__ == "__main__":
    print(json.dumps(measure(sys.argv[1], Path(sys.argv[2]))))
