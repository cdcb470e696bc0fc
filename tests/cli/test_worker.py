"""`gossamer worker`, and a server that keeps one: real processes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from gossamer.cli.worker import _end_with
from tests.cli.jobs import create_job
from tests.cli.running import GOSSAMER, Live, assert_three_lines, environment, run, run_json, up
from tests.cli.test_supervising import is_alive, wait_until
from tests.training.support import counting_examples, write_jsonl

#: A few steps; and so many that they do not end by themselves in a test.
SHORT = ("--set", "max_steps=3", "--set", "batch_size=8", "--set", "density=0.05")
LONG = ("--set", "max_steps=100000", "--set", "batch_size=8")


def worker(live: Live, *options: str) -> list[str]:
    where = ["--base", str(live.base.path), "--data-dir", str(live.data_dir), "--threads", "1"]
    return [str(GOSSAMER), "worker", *where, "--json", *options]


def test_a_worker_serves_the_queue_and_gives_back_what_it_cannot_end(
    live: Live, data: Path
) -> None:
    job = create_job(live.env, data, *SHORT, "--name", "served", "--method", "sparta")
    bad = write_jsonl(data.with_name("bad.jsonl"), [*counting_examples(2), {"prompt": "x"}])
    broken = create_job(live.env, bad, *SHORT, "--name", "broken")
    endless = create_job(live.env, data, *LONG, "--name", "given-back")
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(worker(live), env=environment(), **pipes) as process:
        wait_until(lambda: _step(live.env, endless) > 0, 120)
        assert run_json("jobs", "show", endless["id"], env=live.env)["status"] == "running"
        process.terminate()
        stdout, stderr = process.communicate(timeout=60)
    assert process.returncode == 0, stderr
    first, last = map(json.loads, stdout.splitlines())
    assert (first["event"], first["data_dir"]) == ("working", str(live.data_dir.resolve()))
    assert last == {"event": "ended", "jobs": 3}
    for line in stderr.splitlines():
        json.loads(line)

    shown = run_json("jobs", "show", job["id"], env=live.env)
    assert (shown["status"], shown["fine_tuned_model"]) == ("succeeded", "served")
    assert run("chat", "--model", "served", "-m", "Count 1:", env=live.env).exit_code == 0
    failed = run("jobs", "logs", "-f", broken["id"], env=live.env)
    assert failed.exit_code == 1
    assert "line 3" in failed.stderr
    assert run_json("jobs", "show", endless["id"], env=live.env)["status"] == "queued"
    run_json("jobs", "cancel", endless["id"], env=live.env)


@pytest.mark.usefixtures("logging_restored")
def test_with_an_empty_queue_a_worker_may_end(live: Live) -> None:
    for job in run_json("jobs", "ls", "--limit", "1000", env=live.env)["data"]:
        assert job["status"] not in ("queued", "running"), "a test has left a job"
    done = run(*worker(live, "--once")[1:])
    assert done.exit_code == 0, done.stderr
    last = done.stdout.splitlines()[-1]
    assert json.loads(last) == {"event": "ended", "jobs": 0}


def _step(env: dict[str, str], job: dict[str, Any]) -> int:
    progress = run_json("jobs", "show", job["id"], env=env)["progress"]
    return 0 if progress is None else int(progress["step"])


@pytest.mark.usefixtures("logging_restored")
def test_mistakes_are_three_lines(tmp_path: Path) -> None:
    where = ("--data-dir", tmp_path, "--once")
    assert_three_lines(run("worker", "--base", "no-such-model", *where), "no-such-model")
    for wrong in ("--threads=0", "--lease=0", "--lease=nan", "--nonsense"):
        assert run("worker", wrong, *where).exit_code == 2, wrong
    env = {"GOSSAMER_PORT": "many"}
    assert_three_lines(run("worker", *where, env=env), "GOSSAMER_PORT", code=2)


@contextmanager
def server_with_worker(base: Path, data_dir: Path) -> Iterator[tuple[Any, dict[str, str], Path]]:
    """`gossamer up --with-worker`; its process, what makes commands talk to it, and its log."""
    log = data_dir.with_suffix(".log")
    options = ["--with-worker", "--worker-threads", "1", "--memory", "64MiB", "--threads", "1"]
    with (
        log.open("w") as stderr,
        subprocess.Popen(
            [*up(base, data_dir), "--json", *options],
            stdout=subprocess.PIPE,
            stderr=stderr,
            text=True,
            env=environment(),
        ) as process,
    ):
        try:
            assert process.stdout is not None
            said = json.loads(process.stdout.readline() or log.read_text())
            yield process, {"GOSSAMER_URL": said["url"], "GOSSAMER_API_KEY": said["key"]}, log
        finally:
            process.kill()


def worker_of(server: int) -> int | None:
    """The process id of the server's worker."""
    for file in Path(f"/proc/{server}/task").glob("*/children"):
        for pid in file.read_text().split():
            if b"gossamer.cli" in Path(f"/proc/{pid}/cmdline").read_bytes():
                return int(pid)
    return None


def test_a_worker_notices_that_its_parent_is_gone() -> None:
    stop = threading.Event()
    watch = threading.Thread(target=_end_with, args=(os.getppid(), stop))
    watch.start()
    assert not stop.wait(1.5), "it is there"
    stop.set()
    watch.join()
    stop = threading.Event()
    _end_with(os.getpid(), stop)  # which is nobody's parent here
    assert stop.is_set()


@pytest.mark.gate
def test_a_server_keeps_a_worker(tiny_dir: Callable[..., Path], tmp_path: Path, data: Path) -> None:
    with server_with_worker(tiny_dir("llama"), tmp_path / "data") as (process, env, log):
        done = run("jobs", "create", "--data", data, *SHORT, "--name", "made", "--wait", env=env)
        assert done.exit_code == 0, done.output + log.read_text()
        assert run("chat", "--model", "made", "-m", "Count 1:", env=env).exit_code == 0

        first = worker_of(process.pid)
        assert first is not None
        os.kill(first, signal.SIGKILL)
        wait_until(lambda: worker_of(process.pid) not in (None, first))
        second = worker_of(process.pid)
        assert second is not None
        process.terminate()
        assert process.wait(60) == 0, log.read_text()
        assert not is_alive(second)
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    assert any("ended with -9" in line["message"] for line in lines)
    assert any(line.get("from") == "worker" for line in lines)


@pytest.mark.gate
def test_a_worker_does_not_outlive_its_server(
    tiny_dir: Callable[..., Path], tmp_path: Path
) -> None:
    with server_with_worker(tiny_dir("llama"), tmp_path / "data") as (process, _env, _log):
        wait_until(lambda: worker_of(process.pid) is not None)
        left = worker_of(process.pid)
        assert left is not None
        process.kill()
        process.wait(30)
        wait_until(lambda: not is_alive(left), 60)
