"""A PostgreSQL server for the tests: the one that the environment names, or one of their own."""

from __future__ import annotations

import os
import pwd
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

#: URL of a server on which databases may be made, to be used in place of our own.
VARIABLE = "GOSSAMER_TEST_POSTGRESQL"
#: Where Debian keeps what is not on the path.
_ELSEWHERE = Path("/usr/lib/postgresql")
_START_S = 30.0


def programs() -> Path | None:
    """The folder of `initdb` and `postgres`, the newest of several; None if there is none."""
    found = shutil.which("initdb")
    if found is not None:
        return Path(found).resolve().parent
    folders = sorted(_ELSEWHERE.glob("*/bin"), key=lambda folder: float(folder.parent.name))
    return next((f for f in reversed(folders) if (f / "initdb").exists()), None)


def available() -> bool:
    """Whether `serving` has what it needs."""
    return VARIABLE in os.environ or programs() is not None


@contextmanager
def serving() -> Iterator[str]:
    """The URL of a server's database `postgres`, for sqlalchemy.

    Our own listens on a Unix socket alone and does not wait for the disk.

    Raises:
        RuntimeError: there are no programs of PostgreSQL, or the server did not start.
    """
    if VARIABLE in os.environ:
        yield os.environ[VARIABLE]
        return
    folder = programs()
    if folder is None:
        raise RuntimeError("initdb is not there: install PostgreSQL")
    with tempfile.TemporaryDirectory(prefix="gossamer-postgresql-") as own:
        user, group = os.geteuid(), os.getegid()
        if user == 0:  # it refuses to run as root
            nobody = pwd.getpwnam("nobody")
            user, group = nobody.pw_uid, nobody.pw_gid
            os.chown(own, user, group)
        data, log = Path(own) / "data", Path(own) / "log"
        options = ["--username=postgres", "--auth=trust", "--no-sync", "--encoding=UTF8"]
        made = [str(folder / "initdb"), f"--pgdata={data}", *options, "--locale=C"]
        subprocess.run(made, check=True, capture_output=True, cwd=own, user=user, group=group)
        started = [str(folder / "postgres"), "-D", str(data), "--fsync=off"]
        started += ["--listen-addresses=", f"--unix-socket-directories={own}"]
        with (
            log.open("wb") as errors,
            subprocess.Popen(
                started, stdout=errors, stderr=errors, cwd=own, user=user, group=group
            ) as process,
        ):
            try:
                _await(process, Path(own) / ".s.PGSQL.5432", log)
                yield f"postgresql+psycopg://postgres@/postgres?host={own}"
            finally:
                process.send_signal(signal.SIGINT)  # "fast": connections are closed


def _await(process: subprocess.Popen[bytes], socket: Path, log: Path) -> None:
    """Until the server accepts connections: it says so in its log, after the socket is there."""
    deadline = time.monotonic() + _START_S
    while b"ready to accept connections" not in log.read_bytes():
        if process.poll() is not None or time.monotonic() > deadline:
            raise RuntimeError(f"PostgreSQL did not start: {log.read_text()}")
        time.sleep(0.05)
    if not socket.exists():
        raise RuntimeError(f"PostgreSQL has no socket {socket}")
