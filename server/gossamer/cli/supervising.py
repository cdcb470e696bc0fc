"""A process beside this one that is kept running: the worker of `gossamer up --with-worker`."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Self, TextIO

from gossamer.cli.output import write

if TYPE_CHECKING:
    from gossamer.api.settings import Settings

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Patience:
    """In seconds: of who starts a process again.

    Attributes:
        first, longest: how long to wait before the process is started again, after the first end
            and at most; it doubles in between.
        steady: a process that lasted for so long had started well, and waiting begins anew.
        grace: for the process to end after it was asked to, until it is killed.
    """

    first: float = 1.0
    longest: float = 60.0
    steady: float = 60.0
    grace: float = 30.0


class Supervised:
    """Runs a command, and runs it again whenever it ends. Use it as a context: at its end the
    process is asked to end by SIGTERM.

    The lines that the process writes to standard error come out at this one's, marked as its own.
    It has a session of its own, so that Ctrl-C at a terminal reaches it only from here.

    Args:
        name: marks its lines: the field `from` of a JSON object, added to its log lines and to
            those of ours that carry anything else that it says.
        command, environment: what to run.
    """

    def __init__(
        self,
        name: str,
        command: Sequence[str],
        environment: Mapping[str, str],
        *,
        patience: Patience | None = None,
        stream: TextIO | None = None,
    ) -> None:
        self._name = name
        self._command = list(command)
        self._environment = dict(environment)
        self._patience = patience or Patience()
        self._stream = stream
        self._stop = threading.Event()
        self._process: subprocess.Popen[str] | None = None
        self._thread = threading.Thread(target=self._keep_running, name=name, daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def stop(self) -> None:
        """Have the process end, and wait for it; kill it when its grace is over."""
        self._stop.set()
        if self._process is not None:
            self._process.terminate()
        try:
            self._thread.join(self._patience.grace)
        finally:  # at a second Ctrl-C too
            if self._thread.is_alive() and self._process is not None:
                log.warning("the %s did not end in time and is killed", self._name)
                self._process.kill()
                self._thread.join()

    def _keep_running(self) -> None:
        delay = 0.0
        while not self._stop.is_set():
            began = time.monotonic()
            ended = self._run()
            if self._stop.is_set():
                return
            started_well = time.monotonic() - began >= self._patience.steady
            if started_well or not delay:
                delay = self._patience.first
            else:
                delay = min(2 * delay, self._patience.longest)
            log.warning("the %s %s; it is started again in %g s", self._name, ended, delay)
            self._stop.wait(delay)

    def _run(self) -> str:
        """Run the process once; how it ended, in words."""
        try:
            process = subprocess.Popen(
                self._command,
                env=self._environment,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                text=True,
                encoding="utf-8",
                errors="replace",
                start_new_session=True,
            )
        except OSError as error:
            return f"could not be started ({error.strerror})"
        with process:
            self._process = process
            if self._stop.is_set():  # it was set before there was a process to end
                process.terminate()
            if process.stderr is not None:
                for line in process.stderr:
                    self._relay(line.rstrip("\n"))
            code = process.wait()
        return f"ended with {code}"

    def _relay(self, line: str) -> None:
        try:
            entry = json.loads(line)
        except ValueError:
            entry = None
        if isinstance(entry, dict):
            text = json.dumps({"from": self._name, **entry})
            write(self._stream or sys.stderr, text + "\n")
        elif line.strip():  # what is no log line: a crash's last words
            log.error("%s", line, extra={"from": self._name})


def worker_of(settings: Settings, threads: int | None) -> Supervised:
    """A worker on the server's data folder, with the server's base, database and limits.

    Args:
        threads: of the worker; when not given it takes half of the processors, for the server's
            tenants not to wait for it.
    """
    count = threads or max(1, (os.cpu_count() or 1) // 2)
    command = [sys.executable, "-m", "gossamer.cli", "worker", "--json"]
    command += ["--threads", str(count), "--parent", str(os.getpid())]
    chosen = {
        "GOSSAMER_DATA_DIR": str(settings.data_dir.expanduser().resolve()),
        "GOSSAMER_BASE": settings.base,
        "GOSSAMER_LOG_LEVEL": settings.log_level,
        # not on the command line: an address may hold a password, and everybody sees those
        "GOSSAMER_DATABASE_URL": settings.database_url,
        "GOSSAMER_BLOBS_URL": settings.blobs_url,
    }
    known = {name: value for name, value in chosen.items() if value is not None}
    return Supervised("worker", command, os.environ | known)
