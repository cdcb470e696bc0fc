"""Compiling in several processes, which is where the time goes."""

from __future__ import annotations

import multiprocessing
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import triton

from benchmarks.compiled.checks import faults
from benchmarks.compiled.compiling import Compiled, compile_variant
from benchmarks.compiled.variants import find_variants


@dataclass(frozen=True, slots=True)
class Job:
    """What one process compiles at a time; sent by name, since kernels cannot be pickled."""

    module: str
    name: str
    target: str


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of a job: `compiled` is None if it does not compile."""

    job: Job
    compiled: Compiled | None
    faults: list[str] = field(default_factory=list)

    def columns(self) -> dict[str, str]:
        """As columns of a results file."""
        found = Compiled.no_columns() if self.compiled is None else self.compiled.columns()
        named = {"name": self.job.name, "target": self.job.target}
        return {**found, **named, "faults": "; ".join(self.faults)}


def compile_all(jobs: Sequence[Job], processes: int, cache: Path) -> list[Outcome]:
    """Compiles in processes of their own.

    Args:
        jobs: what to compile.
        processes: how many at a time.
        cache: a folder for Triton's cache.

    Returns:
        what came out, in the order of the jobs.
    """
    with ProcessPoolExecutor(
        processes,
        mp_context=multiprocessing.get_context("spawn"),
        initializer=partial(_prepare, str(cache)),
    ) as pool:
        return list(pool.map(_compile, jobs))


def _prepare(cache: str) -> None:
    triton.knobs.cache.dir = cache
    triton.knobs.compilation.disable_line_info = True


def _compile(job: Job) -> Outcome:
    variant = find_variants([job.module])[job.name][1]
    try:
        compiled = compile_variant(variant, job.target)
    except Exception as error:  # noqa: BLE001 - Triton raises anything, and the others go on
        return Outcome(job, None, [f"does not compile: {_reason(error)}"])
    return Outcome(job, compiled, faults(variant, compiled))


def _reason(error: BaseException) -> str:
    """Where and why; Triton raises one error for every call between the kernel and the mistake."""
    while error.__cause__ is not None:
        error = error.__cause__
    return f"{type(error).__name__}: {error}"
