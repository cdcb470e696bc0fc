"""Help for tests of the command line: commands in this process, and a server in one of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from typer.testing import CliRunner, Result

from gossamer.base.load import BaseFiles
from gossamer.base.sources import open_base
from gossamer.cli.app import app
from gossamer.cli.stores import base_table
from gossamer.store.catalog.views import BaseInfo
from tests.api.running import make_file

#: The installed entry point, as a user starts it.
GOSSAMER = Path(sys.executable).with_name("gossamer")


def environment(**extra: str) -> dict[str, str]:
    """This process's environment without any GOSSAMER_ variable, and with `extra`."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("GOSSAMER_")}
    return {**kept, "OMP_NUM_THREADS": "1", **extra}


def run(*arguments: str | Path, env: Mapping[str, str] | None = None) -> Result:
    """A command in this process."""
    return CliRunner().invoke(app, [str(a) for a in arguments], env=dict(env or {}))


def run_json(*arguments: str | Path, env: Mapping[str, str] | None = None) -> Any:
    """A command that must succeed, with --json; its one document."""
    result = run(*arguments, "--json", env=env)
    assert result.exit_code == 0, result.output
    (line,) = result.stdout.splitlines()
    return json.loads(line)


def assert_three_lines(result: Result, *parts: str, code: int = 1) -> None:
    """The command failed as it should: nothing on standard output, three lines beside it."""
    assert result.exit_code == code, result.output
    assert result.stdout == ""
    lines = result.stderr.splitlines()
    assert len(lines) == 3, result.stderr
    assert lines[0].startswith("Error: ")
    assert all(line.strip() for line in lines)
    for part in parts:
        assert part in result.stderr


@dataclass(frozen=True)
class Live:
    """A server process that answers, and an admin key that was made before it started.

    `said` is the document that it printed.
    """

    said: dict[str, Any]
    key: str
    process: subprocess.Popen[str]
    data_dir: Path
    base: BaseFiles

    @property
    def url(self) -> str:
        """Its address."""
        return str(self.said["url"])

    @property
    def env(self) -> dict[str, str]:
        """What makes the other commands talk to it."""
        return {"GOSSAMER_URL": self.url, "GOSSAMER_API_KEY": self.key}

    def info(self) -> BaseInfo:
        """Its base, as the store knows it."""
        return BaseInfo(self.base.name, self.base.fingerprint, base_table(self.base))

    def make_file(self, seed: int, **options: Any) -> bytes:
        """An adapter file for its base."""
        return make_file(self.info(), seed, **options)

    def adapter(self, folder: Path, seed: int, **options: Any) -> Path:
        """The same, written into a folder."""
        file = folder / f"adapter-{seed}.safetensors"
        file.write_bytes(self.make_file(seed, **options))
        return file


def up(base: Path, data_dir: Path) -> list[str]:
    """The command that starts a server on a free port."""
    where = ["--base", str(base), "--data-dir", str(data_dir), "--port", "0"]
    return [str(GOSSAMER), "up", *where]


@contextmanager
def serving(base: Path, data_dir: Path) -> Iterator[Live]:
    """`gossamer up --json` on a free port; SIGTERM at the end, after which it must end with 0."""
    options = ("--scope", "admin", "--new-tenant", "--data-dir", data_dir)
    key = run_json("keys", "create", *options)["key"]
    log = data_dir.with_suffix(".log")
    with log.open("w") as stderr:
        process = subprocess.Popen(
            [*up(base, data_dir), "--json", "--memory", "64MiB", "--threads", "1"],
            stdout=subprocess.PIPE,
            stderr=stderr,
            text=True,
            env=environment(),
        )
        with process:
            try:
                assert process.stdout is not None
                line = process.stdout.readline()
                assert line, log.read_text()
                said = json.loads(line)
                assert said["event"] == "listening"
                files = open_base(base, data_dir)
                yield Live(said, key, process, data_dir, files)
            finally:
                process.terminate()
                rest, _ = process.communicate(timeout=60)
        assert rest == "", "standard output carries one document only"
        assert process.returncode == 0, log.read_text()
