"""The victim of the kill tests: trains in forked children that die by SIGKILL at chosen moments.

Run as a module. It imports the training stack once and forks for each job before it has computed
anything, so that a run costs a fork and not a start of the interpreter. A job is a line of JSON:

    base, data  the base's folder, the training file
    method, parameters, settings
    folder      the work folder
    kill        null, or ["file", n]: at the n-th use of a file in the work folder;
                ["torn", n]: in the n-th write of a tensor file by torch, half of which is there;
                ["step", n]: after the n-th update

The answer, a line too: `status`, as `os.waitpid` gives it, and what the run made unless it died.
"""

from __future__ import annotations

import gc
import json
import os
import signal
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from gossamer.base.load import BaseFiles
from gossamer.store.format import digest
from gossamer.training import Silent, Step, TrainConfig, loop
from gossamer.training.run import train

#: what Python tells audit hooks about files
FILE_EVENTS = frozenset({"open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "shutil.rmtree"})


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


class Counter(Silent):
    """Counts the updates of this process, and dies at one."""

    def __init__(self, last: int | None) -> None:
        self.updates = 0
        self._last = last

    def stepped(self, event: Step) -> None:
        self.updates += 1
        if self.updates == self._last:
            die()


def count_files(folder: Path, last: int | None) -> Callable[[], int]:
    """Die at the `last`-th use of a file in the folder; how many there were."""
    seen, within = 0, os.fspath(folder)

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal seen
        if event not in FILE_EVENTS or not isinstance(arguments[0], str | bytes | os.PathLike):
            return
        if os.fsdecode(arguments[0]).startswith(within):
            seen += 1
            if seen == last:
                die()

    sys.addaudithook(hook)
    return lambda: seen


def tear_saves(last: int) -> None:
    """Die in the `last`-th file that torch writes, when half of it is there."""
    save, seen = torch.save, 0

    def torn(value: Any, file: Any, *args: Any, **kwargs: Any) -> None:
        nonlocal seen
        save(value, file, *args, **kwargs)
        seen += 1
        if seen == last:
            os.truncate(file, Path(file).stat().st_size // 2)
            die()

    torch.save = torn  # type: ignore[assignment]


def work(job: dict[str, Any]) -> dict[str, Any]:
    """One run, to its end."""
    kind, number = job["kill"] or ("", 0)
    folder = Path(job["folder"])
    # A checkpoint after every step, however long it takes.
    loop.CHECKPOINT_SECONDS, loop.CHECKPOINT_SHARE = 0.0, 1e9
    if kind == "torn":
        tear_saves(number)
    files = count_files(folder, number if kind == "file" else None)
    counter = Counter(number if kind == "step" else None)
    config = TrainConfig.of(
        data=job["data"], method=job["method"], parameters=job["parameters"], **job["settings"]
    )
    base = BaseFiles("tiny", Path(job["base"]), job["fingerprint"])
    result = train(config, base, watcher=counter, folder=folder)
    return {
        "digest": digest(result.delta_set),
        "losses": list(result.losses),
        "evaluations": [asdict(one) for one in result.evaluations],
        "record": dict(result.record),
        "files": files(),
        "updates": counter.updates,
    }


def forked(job: dict[str, Any]) -> dict[str, Any]:
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            os.close(read)
            with os.fdopen(write, "w") as out:
                json.dump(work(job), out)
            status = 0
        finally:
            os._exit(status)
    os.close(write)
    with os.fdopen(read) as told:
        text = told.read()
    status = os.waitpid(pid, 0)[1]
    return {"status": status, **(json.loads(text) if text else {})}


def main() -> None:
    """Answer every line of stdin."""
    torch.set_num_threads(1)
    gc.collect()
    gc.freeze()
    for line in sys.stdin:
        sys.stdout.write(json.dumps(forked(json.loads(line))) + "\n")
        sys.stdout.flush()
    gc.unfreeze()


if __name__ == "__main__":
    main()
