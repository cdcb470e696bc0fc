"""A terminal that a command believes in."""

from __future__ import annotations

import os
import pty
import select
import subprocess
import time
from collections.abc import Mapping, Sequence


class Terminal:
    """A process whose three streams are a pseudo-terminal. Use it as a context."""

    def __init__(self, command: Sequence[str], env: Mapping[str, str]) -> None:
        self._ours, theirs = pty.openpty()
        self._process = subprocess.Popen(
            command,
            stdin=theirs,
            stdout=theirs,
            stderr=theirs,
            env={**env, "TERM": "xterm-256color", "COLUMNS": "100"},
            start_new_session=True,
        )
        os.close(theirs)
        self.text = ""

    def __enter__(self) -> Terminal:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.wait()
        os.close(self._ours)

    def type(self, text: str) -> None:
        """As if on a keyboard."""
        os.write(self._ours, text.encode())

    def wait_for(self, text: str, timeout: float = 60.0) -> str:
        """Read until `text` has been shown; what was shown since the last call."""
        seen, end = "", time.monotonic() + timeout
        while text not in seen:
            assert time.monotonic() < end, f"{text!r} did not come:\n{self.text}"
            seen += self._read()
        return seen

    def finish(self, timeout: float = 60.0) -> int:
        """Read to the end; the exit code."""
        end = time.monotonic() + timeout
        while self._process.poll() is None:
            assert time.monotonic() < end, self.text
            self._read()
        self._read()
        return self._process.returncode

    def _read(self) -> str:
        if not select.select([self._ours], [], [], 0.1)[0]:
            return ""
        try:
            shown = os.read(self._ours, 1 << 16).decode(errors="replace")
        except OSError:  # Linux's way to say that the other end is closed
            return ""
        self.text += shown
        return shown
