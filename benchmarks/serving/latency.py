"""Times to the first token: a long prompt, and an adapter that is not in memory."""

from __future__ import annotations

import os
import statistics
import tempfile
from pathlib import Path

from benchmarks.common import Meter
from benchmarks.serving.adapters import Recipe, Target, make, mix
from benchmarks.serving.engine import Bench
from benchmarks.serving.figures import Figure, Goal, Sample
from benchmarks.serving.prompts import long_prompt
from gossamer.merge import BASE
from gossamer.store.catalog.opening import Store
from gossamer.store.catalog.views import BaseInfo
from gossamer.store.delta import DeltaSet
from gossamer.store.format import write

GROUP = "Time to the first token"
TENANT = "bench"
PREFILL_TOKENS = 512
#: Pairs of a round; a first token takes a fraction of a second.
PAIRS = 5
#: Rows that decode beside the request whose adapter is loaded.
BUSY_ROWS = 8


class Prefill:
    """A prompt of 512 tokens, one new token, alone in the engine."""

    def __init__(self, bench: Bench) -> None:
        self._bench = bench
        self._prompt = long_prompt(bench.tokenizer, PREFILL_TOKENS)
        self._mix = mix((bench.library.add(Recipe("element", 0.01, seed=900)), 1.0))
        self.base = Figure(GROUP, f"prompt of {PREFILL_TOKENS} tokens, base only", "ms")
        self.adapter = Figure(
            GROUP, f"prompt of {PREFILL_TOKENS} tokens, a 1 % adapter", "ms", "base-only",
            goal=Goal("<=", 1.15),
        )  # fmt: skip

    def warm_up(self) -> None:
        """Load the adapter, compile what long prompts need."""
        self._bench.first_token(self._prompt, self._mix)

    def run_round(self) -> None:
        """Alternate; medians of five pairs."""
        plain, patched = [], []
        with Meter() as meter:
            for _ in range(PAIRS):
                plain.append(self._bench.first_token(self._prompt, BASE))
                patched.append(self._bench.first_token(self._prompt, self._mix))
        a, b = statistics.median(plain), statistics.median(patched)
        self.base.samples.append(Sample(1e3 * a, foreign=meter.foreign))
        self.adapter.samples.append(Sample(1e3 * b, b / a, meter.foreign))


class Shelf:
    """A real store in a folder, with 1 % adapters that no process has in memory."""

    def __init__(self, folder: Path, target: Target) -> None:
        info = BaseInfo(target.name, target.fingerprint, target.table)
        self._folder = folder
        self._target = target
        self._store = Store(folder, info, owner=True)
        self._store.catalog.create_tenant(TENANT)
        self._count = 0

    def close(self) -> None:
        """Close the store; the folder stays."""
        self._store.close()

    def open(self, digest: str) -> DeltaSet:
        """The engine's source: the bytes verified, decoded and validated."""
        return self._store.catalog.open(digest)

    def push(self) -> str:
        """Upload another adapter and return its digest."""
        self._count += 1
        made = make(Recipe("element", 0.01, seed=2000 + self._count), self._target)
        with tempfile.TemporaryFile(dir=self._folder) as file:
            write(made, file)
            file.seek(0)
            version = self._store.catalog.upload(TENANT, f"cold-{self._count}", file)
        return version.digest

    def drop_page_cache(self) -> None:
        """Have the kernel forget the stored bytes, so that they are read from the disk."""
        for path in (p for p in (self._folder / "store").rglob("*") if p.is_file()):
            with path.open("rb") as file:
                os.fsync(file.fileno())
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


class Cold:
    """The same request with its adapter on disk and then in memory, beside rows that decode."""

    def __init__(self, bench: Bench, shelf: Shelf, rounds: int) -> None:
        self._bench = bench
        self._shelf = shelf
        self._names = [shelf.push() for _ in range(PAIRS * rounds + 1)]
        self._next = iter(self._names)
        name = f"1 % adapter, {BUSY_ROWS} rows decoding"
        self.resident = Figure(GROUP, f"{name}, in memory", "ms")
        self.cold = Figure(GROUP, f"{name}, on disk", "ms", "in memory", goal=Goal("<=", 1.3))

    def warm_up(self) -> None:
        """One load, for what a first one pays once in a process."""
        self._bench.first_token(self._bench.prompts[-1], mix((next(self._next), 1.0)))

    def run_round(self) -> None:
        """Each adapter once from disk and once from memory."""
        cold, resident = [], []
        prompt = self._bench.prompts[-1]
        self._shelf.drop_page_cache()
        with self._bench.load(BUSY_ROWS), Meter() as meter:
            for _ in range(PAIRS):
                wanted = mix((next(self._next), 1.0))
                cold.append(self._bench.first_token(prompt, wanted))
                resident.append(self._bench.first_token(prompt, wanted))
        a, b = statistics.median(resident), statistics.median(cold)
        self.resident.samples.append(Sample(1e3 * a, foreign=meter.foreign))
        self.cold.samples.append(Sample(1e3 * b, b / a, meter.foreign))
