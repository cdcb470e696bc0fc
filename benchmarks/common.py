"""What every benchmark shares: provenance, the meter, CSV files and tables.

Standard library only, so that the runners of other systems can import it in their own environments.
"""

from __future__ import annotations

import csv
import datetime
import os
import platform
import subprocess
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"

#: Packages whose version decides a figure.
_PACKAGES = ("torch", "transformers", "numpy", "numba")


@dataclass(frozen=True)
class Provenance:
    """Where and with what a figure was measured; goes into every line of a results file."""

    date: str
    commit: str
    machine: str
    cores: int
    versions: str

    @classmethod
    def here(cls, packages: Sequence[str] = _PACKAGES) -> Provenance:
        """This machine, this checkout, the packages of this environment."""
        now = datetime.datetime.now(datetime.UTC)
        return cls(
            date=now.strftime("%Y-%m-%d %H:%M"),
            commit=_commit(),
            machine=f"{_processor()}, {_memory()}, {platform.system()} {platform.release()}",
            cores=len(os.sched_getaffinity(0)),
            versions=versions(packages),
        )

    def columns(self) -> dict[str, str]:
        """As columns of a results file."""
        return {
            "date": self.date,
            "commit": self.commit,
            "machine": self.machine,
            "cores": str(self.cores),
            "versions": self.versions,
        }


def versions(packages: Sequence[str]) -> str:
    """`python 3.11.7, torch 2.13.0, …`, without the packages that are not installed."""
    found = [f"python {platform.python_version()}"]
    for package in packages:
        try:
            found.append(f"{package} {metadata.version(package)}")
        except metadata.PackageNotFoundError:
            continue
    return ", ".join(found)


class Meter:
    """Wall time of a block, and the share of the machine that other processes used meanwhile.

    A timing taken while somebody else computes is worth little, and nothing in the figure itself
    shows it; so every measurement carries `foreign`, and the reader (and `--quiet`) can judge it.

    Attributes:
        seconds: wall time.
        foreign: CPU time of all other processes / (seconds * CPUs), 0 to 1; nan where /proc is
            missing.
    """

    seconds: float = 0.0
    foreign: float = float("nan")

    def __enter__(self) -> Meter:
        self._busy, self._own = _busy_seconds(), _tree_seconds(os.getpid())
        self._start = time.perf_counter()
        return self

    def __exit__(self, *_: object) -> None:
        self.seconds = time.perf_counter() - self._start
        busy, own = _busy_seconds() - self._busy, _tree_seconds(os.getpid()) - self._own
        available = self.seconds * (os.cpu_count() or 1)
        self.foreign = min(1.0, max(0.0, (busy - own) / available))


def bind_cpus(count: int) -> None:
    """Keep this process and its children on the first `count` CPUs that it may use."""
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:count])


def write_csv(path: Path, lines: Sequence[Mapping[str, str]]) -> None:
    """All lines have the columns of the first. An existing file is replaced."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(lines[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(lines)


def append_csv(path: Path, lines: Sequence[Mapping[str, str]]) -> None:
    """Add lines to a results file, which is made if it is not there.

    Raises:
        ValueError: it has other columns.
    """
    if not path.is_file():
        write_csv(path, lines)
        return
    with path.open("r+", newline="") as file:
        columns = next(csv.reader(file))
        if any(list(line) != columns for line in lines):
            raise ValueError(f"{path} has other columns")
        file.seek(0, os.SEEK_END)
        csv.DictWriter(file, columns, lineterminator="\n").writerows(lines)


def read_csv(path: Path) -> list[dict[str, str]]:
    """The lines of a results file."""
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def markdown(head: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    """A Markdown table; the first column to the left, the others to the right."""
    rule = ["---"] + ["---:"] * (len(head) - 1)
    return "\n".join("| " + " | ".join(line) + " |" for line in (head, rule, *lines))


def replaced(page: str, name: str, text: str) -> str:
    """A page with another text between its marks, the comments `NAME: begin` and `NAME: end`.

    Raises:
        ValueError: it has no such marks.
    """
    begin, end = f"<!-- {name}: begin -->", f"<!-- {name}: end -->"
    before, found, rest = page.partition(begin)
    _, closed, after = rest.partition(end)
    if not (found and closed):
        raise ValueError(f"no {begin} … {end}")
    return f"{before}{begin}\n{text}\n{end}{after}"


def aligned(head: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """The same table for a terminal."""
    widths = [max(len(line[i]) for line in (head, *lines)) for i in range(len(head))]

    def render(line: Sequence[str]) -> str:
        cells = [line[0].ljust(widths[0])]
        cells += [cell.rjust(width) for cell, width in zip(line[1:], widths[1:], strict=True)]
        return "  ".join(cells).rstrip()

    return "\n".join([render(head), render(["-" * w for w in widths]), *map(render, lines)])


def _commit() -> str:
    def git(*arguments: str) -> str:
        command = ["git", "-C", str(ROOT), *arguments]
        try:
            run = subprocess.run(command, capture_output=True, text=True, check=False)
        except FileNotFoundError:  # a bare machine has no git
            return ""
        return run.stdout.strip()

    commit = git("rev-parse", "--short=12", "HEAD") or "unknown"
    changed = git("status", "--porcelain", "--", ".", ":!benchmarks/results", ":!README.md")
    return f"{commit}+changes" if changed else commit


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def _memory() -> str:
    size = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return f"{size / 2**30:.0f} GiB"


def _busy_seconds() -> float:
    """CPU time that all processes of the machine have used, without idle, iowait and steal."""
    try:
        first = Path("/proc/stat").read_text().splitlines()[0].split()
    except OSError:
        return float("nan")
    user, nice, system, _, _, irq, softirq = map(int, first[1:8])
    return (user + nice + system + irq + softirq) / os.sysconf("SC_CLK_TCK")


def _tree_seconds(root: int) -> float:
    """CPU time of a process and its descendants, the ended ones that were waited for included."""
    parents: dict[int, int] = {}
    used: dict[int, float] = {}
    for entry in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = entry.read_text().rpartition(")")[2].split()
        except OSError:  # it ended between the listing and the reading
            continue
        pid = int(entry.parent.name)
        parents[pid] = int(fields[1])
        used[pid] = sum(map(int, fields[11:15])) / os.sysconf("SC_CLK_TCK")
    children: dict[int, list[int]] = {}
    for pid, parent in parents.items():
        children.setdefault(parent, []).append(pid)
    total, queue = 0.0, [root]
    while queue:
        pid = queue.pop()
        total += used.get(pid, 0.0)
        queue += children.get(pid, [])
    return total


def machine_is_quiet(seconds: float = 2.0, limit: float = 0.05) -> bool:
    """Whether other processes use less than `limit` of the machine; takes `seconds` to find out."""
    with Meter() as meter:
        time.sleep(seconds)
    return not meter.foreign > limit
