"""A process that works and dies by SIGKILL where it is told to, over and over.

It imports once and forks for every order, before anything has started a thread, so 50 crashes cost
50 forks and not 50 starts of the interpreter. An order is a line on its stdin, a JSON object:

    data       the data folder
    point      the failpoint to die at
    nth        the how-manieth passing of it
    arguments  what else the work takes

The answer on stdout is the fork's exit status as `os.waitpid` gives it.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from gossamer.store.failpoints import Failpoint, KillAt
from tests.store.support import start_child

#: The wait status of what has died as it was told to.
KILLED = int(signal.SIGKILL)
#: One life: of a data folder, the hook for its store, and an order's arguments; returns the exit
#: status.
Work = Callable[..., int]


class Victim:
    """Does `work` in forks of a process of its own. Use it as a context."""

    def __init__(self, work: Work) -> None:
        script = f"from {work.__module__} import {work.__name__} as work; obey(work)"
        self._process = start_child(f"from {__name__} import obey; {script}")

    def __enter__(self) -> Victim:
        return self

    def __exit__(self, *_: object) -> None:
        assert self._close() == ""

    def run(self, data: Path, point: Failpoint, nth: int, *arguments: Any) -> int:
        """One life, to the nth passing of the point or to its end; returns the wait status."""
        stdin, stdout = self._process.stdin, self._process.stdout
        if stdin is None or stdout is None:
            raise RuntimeError("no pipes")
        order = {"data": str(data), "point": point, "nth": nth, "arguments": arguments}
        stdin.write(json.dumps(order) + "\n")
        stdin.flush()
        return int(stdout.readline())

    def _close(self) -> str:
        """End the process; returns what it had to complain about."""
        try:
            return self._process.communicate(timeout=30)[1]
        except subprocess.TimeoutExpired:
            self._process.kill()
            raise


def obey(work: Work) -> None:
    """What the process does: a fork for every line of stdin."""
    for line in sys.stdin:
        child = os.fork()
        if child == 0:
            status = 1
            try:
                order = json.loads(line)
                hook = KillAt(Failpoint(order["point"]), order["nth"])
                status = work(Path(order["data"]), hook, *order["arguments"])
            finally:
                sys.stderr.flush()
                os._exit(status)
        _, status = os.waitpid(child, 0)
        print(status, flush=True)  # noqa: T201
