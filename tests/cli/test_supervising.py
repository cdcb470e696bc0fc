"""A process that is kept running, and signals that end one in order."""

from __future__ import annotations

import io
import json
import logging
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from gossamer.api.settings import Settings
from gossamer.cli.signals import stopping
from gossamer.cli.supervising import Patience, Supervised, worker_of

QUICK = Patience(first=0.05, longest=0.2, steady=60.0, grace=10.0)


class Child:
    """A Python program under supervision that writes a line to `file` whenever it begins."""

    def __init__(self, folder: Path, code: str, patience: Patience = QUICK) -> None:
        self.file = folder / "begun"
        self.file.touch()
        self.stream = io.StringIO()
        begin = (
            "import os, signal, sys, time\n"
            f"open({str(self.file)!r}, 'a').write(f'{{os.getpid()}} {{time.monotonic()}}\\n')\n"
        )
        self.supervised = Supervised(
            "worker",
            [sys.executable, "-u", "-S", "-c", begin + code],
            dict(os.environ),
            patience=patience,
            stream=self.stream,
        )

    def begun(self) -> list[tuple[int, float]]:
        """Process id and time of each beginning."""
        lines = [line.split() for line in self.file.read_text().splitlines()]
        return [(int(pid), float(moment)) for pid, moment in lines]


def wait_until(ready: Callable[[], object], seconds: float = 30.0) -> None:
    end = time.monotonic() + seconds
    while not ready():
        assert time.monotonic() < end
        time.sleep(0.01)


def is_alive(pid: int) -> bool:
    """Whether a process runs; one that has ended and that nobody has asked after does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def test_it_is_started_again_ever_more_slowly(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    child = Child(tmp_path, "sys.exit(3)")
    with child.supervised:
        wait_until(lambda: len(child.begun()) >= 5)
    delays = [record.args[2] for record in caplog.records if "started again" in record.message]  # type: ignore[index]
    assert delays[:4] == [0.05, 0.1, 0.2, 0.2]
    assert "the worker ended with 3" in caplog.text
    moments = [moment for _, moment in child.begun()]
    assert moments[4] - moments[3] >= 0.2
    begun = len(moments)
    time.sleep(0.5)
    assert len(child.begun()) == begun, "nobody starts it any more"


def test_patience_begins_anew_after_it_ran_well(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    patience = Patience(first=0.05, longest=9.0, steady=0.01, grace=10.0)
    child = Child(tmp_path, "time.sleep(0.05)", patience)
    with child.supervised:
        wait_until(lambda: len(child.begun()) >= 4)
    delays = {record.args[2] for record in caplog.records if "started again" in record.message}  # type: ignore[index]
    assert delays == {0.05}


def test_its_lines_are_marked(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    code = """
sys.stderr.write('{"level": "info", "message": "one"}\\n\\nTraceback: \\u2603 broken\\n[1]\\n')
print("standard output is nobody's")
signal.pause()
"""
    child = Child(tmp_path, code)
    with child.supervised:
        wait_until(lambda: "[1]" in caplog.text)
    (line,) = child.stream.getvalue().splitlines()
    assert json.loads(line) == {"from": "worker", "level": "info", "message": "one"}
    others = [r for r in caplog.records if getattr(r, "from", None) == "worker"]
    assert [record.getMessage() for record in others] == ["Traceback: ☃ broken", "[1]"]


def test_it_is_asked_to_end_and_waited_for(tmp_path: Path) -> None:
    code = """
def end(*_):
    time.sleep(0.2)
    open(sys.argv[1], "w").write("in order")
    sys.exit(0)
signal.signal(signal.SIGTERM, end)
sys.stderr.write('{"ready": 1}\\n')
while True: signal.pause()
"""
    ended = tmp_path / "ended"
    child = Child(tmp_path, code)
    child.supervised._command.append(str(ended))
    with child.supervised:
        wait_until(child.stream.getvalue)
    assert ended.read_text() == "in order"
    assert len(child.begun()) == 1


def test_one_that_does_not_end_is_killed(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    code = """
signal.signal(signal.SIGTERM, signal.SIG_IGN)
sys.stderr.write('{"ready": 1}\\n')
while True: signal.pause()
"""
    child = Child(tmp_path, code, Patience(first=0.05, grace=0.3))
    with child.supervised:
        wait_until(child.stream.getvalue)
    ((pid, _),) = child.begun()
    assert not is_alive(pid)
    assert "did not end in time" in caplog.text


def test_a_signal_of_the_terminal_does_not_reach_it(tmp_path: Path) -> None:
    child = Child(tmp_path, "signal.pause()")
    with child.supervised:
        wait_until(child.begun)
        ((pid, _),) = child.begun()
        assert os.getsid(pid) != os.getsid(0)


def test_a_command_that_is_not_there(caplog: pytest.LogCaptureFixture) -> None:
    with Supervised("worker", ["/no/such/program"], {}, patience=QUICK):
        wait_until(lambda: caplog.text.count("could not be started") >= 2)


def test_it_may_end_before_it_has_begun(tmp_path: Path) -> None:
    for _ in range(5):
        child = Child(tmp_path, "signal.pause()")
        began = time.monotonic()
        with child.supervised:
            pass
        assert time.monotonic() - began < 5
        for pid, _ in child.begun():
            assert not is_alive(pid)


def test_a_worker_gets_the_servers_settings(tmp_path: Path) -> None:
    secret = "postgresql://me:secret@db/x"
    settings = Settings(data_dir=tmp_path, base="tiny", database_url=secret, log_level="warning")
    made = worker_of(settings, 3)
    words = made._command
    assert words[1:4] == ["-m", "gossamer.cli", "worker"]
    assert words[words.index("--threads") + 1] == "3"
    assert words[words.index("--parent") + 1] == str(os.getpid())
    assert not any("secret" in word for word in words)
    given = {name: made._environment.get(f"GOSSAMER_{name}") for name in ("DATA_DIR", "BASE")}
    assert given == {"DATA_DIR": str(tmp_path), "BASE": "tiny"}
    assert made._environment["GOSSAMER_DATABASE_URL"] == secret
    assert "GOSSAMER_BLOBS_URL" not in made._environment
    half = max(1, (os.cpu_count() or 1) // 2)
    words = worker_of(settings, None)._command
    assert words[words.index("--threads") + 1] == str(half)


def signalled(code: str, *signals: int) -> tuple[int, str]:
    """Run a program that says `ready`, send it these in turn; its exit code and its words."""
    program = f"import sys\nfrom gossamer.cli.signals import stopping\n{code}"
    options: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen([sys.executable, "-u", "-c", program], **options) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        for number in signals:
            process.send_signal(number)
            time.sleep(0.3)
        out, _ = process.communicate(timeout=30)
    return process.returncode, out


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_first_signal_asks(number: int) -> None:
    code = "with stopping() as stop:\n    print('ready'); print(stop.wait(30))"
    assert signalled(code, number) == (0, "True\n")


def test_the_second_signal_ends() -> None:
    code = "import time\nwith stopping() as stop:\n    print('ready'); time.sleep(30)"
    assert signalled(code, signal.SIGTERM, signal.SIGTERM)[0] == -signal.SIGTERM
    assert signalled(code, signal.SIGINT, signal.SIGINT)[0] in (-signal.SIGINT, 1)


def test_signals_mean_what_they_meant_before() -> None:
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    with stopping() as stop:
        assert isinstance(stop, threading.Event)
        assert signal.getsignal(signal.SIGTERM) != before[1]
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before
    assert not stop.is_set()
    assert logging.getLogger("gossamer").level == logging.NOTSET
