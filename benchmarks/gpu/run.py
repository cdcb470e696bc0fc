"""The run: the card, its provenance, the tests, the sections."""

from __future__ import annotations

import datetime
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Collection
from importlib.util import find_spec
from pathlib import Path

import torch

from benchmarks.common import ROOT, Provenance, versions
from benchmarks.gpu.bench import Bench, run_sections
from benchmarks.gpu.ceilings import copy_bandwidth
from benchmarks.gpu.deltas import Deltas
from benchmarks.gpu.record import INTERPRETER, Record, open_record
from benchmarks.gpu.sections import SECTIONS
from benchmarks.gpu.setting import Setting, real, toy
from benchmarks.gpu.timing import Timer

_PACKAGES = ("torch", "triton", "transformers", "numpy")
#: What the tests may take of the whole time.
_TEST_SECONDS = 240.0
#: Where the tests that need a card are. All else of what these import is there without a server.
_TESTED = ("tests/kernels", "tests/engine/test_triton_mixes.py", "tests/base/test_load.py")
#: Processes that run them, where pytest-xdist is there: most of their time is Triton's compiler's.
_WORKERS = 8


class NoCardError(Exception):
    """There is no CUDA device."""


class UnknownSectionError(Exception):
    """There is no such section."""

    def __init__(self, names: Collection[str]) -> None:
        known = ", ".join(section.name for section in SECTIONS)
        super().__init__(f"no section {', '.join(names)}; there are {known}")
        self.names = names


def run(
    csv: Path, only: Collection[str], end: float, *, dry_run: bool, tests: bool,
    commit: str | None = None,
) -> int:  # fmt: skip
    """Everything; the exit status.

    Args:
        csv: results file, replaced.
        only: names of sections; none is all.
        end: of the run, by `time.monotonic`.
        dry_run: in the interpreter.
        tests: run the tests that need a card first.
        commit: what is measured, where the checkout cannot say it.

    Raises:
        NoCardError, UnknownSectionError
    """
    unknown = set(only) - {section.name for section in SECTIONS}
    if unknown:
        raise UnknownSectionError(sorted(unknown))
    if not dry_run and not torch.cuda.is_available():
        raise NoCardError("there is no CUDA device")
    failed = [] if not tests or _tests_pass() else ["tests"]
    setting = toy() if dry_run else real()
    with open_record(csv) as file:
        card = INTERPRETER if dry_run else torch.cuda.get_device_name(setting.device)
        record = Record(file, card, _stamp(commit), copy_bandwidth(setting))
        print(f"{card}, copies {record.copy_bandwidth / 1e12:.3g} TB/s; to {csv}", flush=True)
        bench = _bench(setting, record)
        chosen = [section for section in SECTIONS if not only or section.name in only]
        failed += run_sections(bench, chosen, end)
    lines = ", ".join(f"{count} {table}" for table, count in record.counts.items())
    print(f"\nwritten to {csv}: {lines}")
    for section, count in bench.left_out.items():
        print(f"left out for time or memory: {count} of {section}")
    print(f"failed: {', '.join(failed) or 'nothing'}")
    return 1 if failed else 0


def _bench(setting: Setting, record: Record) -> Bench:
    timer = Timer(setting.device, setting.repetitions, setting.sweep_bytes)
    return Bench(setting, record, timer, Deltas(setting.device))


def _stamp(commit: str | None) -> dict[str, str]:
    if commit is None:
        commit = Provenance.here(_PACKAGES).commit if shutil.which("git") else "unknown"
    now = datetime.datetime.now(datetime.UTC)
    return {
        "driver": _driver(),
        "versions": versions(_PACKAGES),
        "commit": commit,
        "date": now.strftime("%Y-%m-%d %H:%M"),
    }


def _driver() -> str:
    """Its version; empty where nobody says."""
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        found = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError:
        return ""
    return found.stdout.split("\n")[0].strip() if found.returncode == 0 else ""


def _tests_pass() -> bool:
    """`pytest -m gpu`, its last lines shown. The interpreter is off: kernels are compiled."""
    start = time.monotonic()
    # A machine for this run alone need not have the plugins that the project's own settings name.
    command = [
        sys.executable, "-m", "pytest", "-m", "gpu", "-q", "--no-header", *_TESTED,
        "-o", "addopts=--import-mode=importlib -ra", "-W", "ignore::pytest.PytestConfigWarning",
    ]  # fmt: skip
    command += ["-n", str(_WORKERS)] if find_spec("xdist") is not None else []
    paths = [str(ROOT / source) for source in ("", "server", "kernels", "adapters_store")]
    environment = {**os.environ, "TRITON_INTERPRET": "0", "PYTHONPATH": os.pathsep.join(paths)}
    with tempfile.TemporaryFile("w+") as file:
        process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=file, stderr=file)
        try:
            status = str(process.wait(_TEST_SECONDS))
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            status = f"none after {_TEST_SECONDS:.0f} s"
        file.seek(0)
        print("\n".join(["tests:", *file.read().strip().splitlines()[-40:]]), flush=True)
    print(f"tests: {time.monotonic() - start:.0f} s, exit status {status}", flush=True)
    return status == "0"
