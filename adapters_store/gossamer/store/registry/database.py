"""Connections to the registry: short read and write transactions, each atomic and durable.

SQLite runs in WAL mode with `synchronous=FULL`: a commit is on the disk when it returns (200 to 900
a second, by the disk), and readers are not blocked by a writer. Every write transaction starts with
BEGIN IMMEDIATE, so what it reads cannot change before it writes. On PostgreSQL the same code gets
that from the row locks (`with_for_update`) that each write takes first, which SQLite ignores.
"""

from __future__ import annotations

import sqlite3
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import sqlalchemy as sa
from sqlalchemy.exc import DBAPIError
from sqlalchemy.orm import Session

from gossamer.store.catalog.errors import RegistryBusy, StoreFull
from gossamer.store.registry.migrate import upgrade

_SQLITE_BUSY, _SQLITE_LOCKED, _SQLITE_FULL = 5, 6, 13
#: PostgreSQL: lock timeout, deadlock, serialization failure; disk full
_PG_BUSY, _PG_FULL = {"55P03", "40P01", "40001"}, {"53100"}


class Registry:
    """A database by URL (`sqlite:///…` or `postgresql+psycopg://…`). Thread-safe.

    Args:
        url: SQLAlchemy URL. A SQLite file is made when missing; its folder must exist.
        busy_timeout_s: how long a transaction waits for another writer before `RegistryBusy`.
    """

    def __init__(self, url: str, *, busy_timeout_s: float = 5.0) -> None:
        self.busy_timeout_s = busy_timeout_s
        self._engine = _engine(url, busy_timeout_s)
        self._writer = self._engine.execution_options(gossamer_write=True)
        # SQLite's own waiting is by polling with growing sleeps and unfair: with 20 threads some
        # starve until the timeout. Threads of one process therefore queue here first.
        self._one_writer = threading.Lock() if self._engine.dialect.name == "sqlite" else None

    @property
    def path(self) -> Path | None:
        """The SQLite file, or None on a database server."""
        name = self._engine.url.database
        return Path(name) if self._engine.dialect.name == "sqlite" and name else None

    def migrate(self) -> None:
        """Bring the schema up to this release's, from empty or from any older one; atomic, and
        harmless when another process does the same at the same time.

        Raises:
            RegistryTooNew: a later release wrote it.
            RegistryBusy
        """
        with self._errors(), self._queue(), self._writer.begin() as connection:
            upgrade(connection)

    @contextmanager
    def read(self) -> Iterator[Session]:
        """A session that sees one state of the database throughout and writes nothing.

        Raises:
            RegistryBusy
        """
        with self._errors(), Session(self._engine, expire_on_commit=False) as session:
            yield session

    @contextmanager
    def write(self) -> Iterator[Session]:
        """A session committed when the block ends, rolled back when it raises.

        Everything in it is durable, or none of it, when this returns. Keep blobs' bytes out of it:
        other writers wait.

        Raises:
            RegistryBusy: another process kept its lock past the timeout; nothing was written.
            StoreFull: no room for the commit; nothing was written.
        """
        with (
            self._errors(),
            self._queue(),
            Session(self._writer, expire_on_commit=False) as session,
            session.begin(),
        ):
            yield session

    def close(self) -> None:
        """Close every connection."""
        self._engine.dispose()

    @contextmanager
    def _queue(self) -> Iterator[None]:
        if self._one_writer is None:
            yield
            return
        if not self._one_writer.acquire(timeout=self.busy_timeout_s):
            raise RegistryBusy(self.busy_timeout_s)
        try:
            yield
        finally:
            self._one_writer.release()

    @contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except DBAPIError as error:
            cause = error.orig
            # sqlite3 gives the extended code; its low byte is the kind of error
            code = getattr(cause, "sqlite_errorcode", 0) & 0xFF
            state = getattr(cause, "sqlstate", None)
            if code in (_SQLITE_BUSY, _SQLITE_LOCKED) or state in _PG_BUSY:
                raise RegistryBusy(self.busy_timeout_s) from error
            if code == _SQLITE_FULL or state in _PG_FULL:
                raise StoreFull("registry", str(cause)) from error
            raise


def _switch_to_wal(connection: sqlite3.Connection, busy_timeout_s: float) -> None:
    """The first connection to a new file changes its mode. SQLite does not wait for its lock then,
    whatever the timeout, when another process is doing the same."""
    deadline = time.monotonic() + busy_timeout_s
    while True:
        try:
            connection.execute("PRAGMA journal_mode=WAL")
            return
        except sqlite3.OperationalError as error:
            busy = error.sqlite_errorcode & 0xFF in (_SQLITE_BUSY, _SQLITE_LOCKED)
            if not busy or time.monotonic() > deadline:
                raise
            time.sleep(0.01)


def _engine(url: str, busy_timeout_s: float) -> sa.Engine:
    parsed = sa.make_url(url)
    if parsed.get_backend_name() != "sqlite":
        options = f"-c lock_timeout={int(busy_timeout_s * 1000)}"
        return sa.create_engine(parsed, connect_args={"options": options}, pool_pre_ping=True)
    engine = sa.create_engine(
        parsed, connect_args={"timeout": busy_timeout_s}, pool_size=4, max_overflow=-1
    )

    @sa.event.listens_for(engine, "connect")
    def _on_connect(connection: Any, _record: object) -> None:
        # Python's sqlite3 would open transactions by itself, and later than it should.
        connection.isolation_level = None
        _switch_to_wal(connection, busy_timeout_s)
        for pragma in ("synchronous=FULL", "foreign_keys=ON"):
            connection.execute(f"PRAGMA {pragma}")

    @sa.event.listens_for(engine, "begin")
    def _on_begin(connection: sa.Connection) -> None:
        write = connection.get_execution_options().get("gossamer_write", False)
        connection.exec_driver_sql("BEGIN IMMEDIATE" if write else "BEGIN")

    return engine
