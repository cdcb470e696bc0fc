"""A toy base, adapters for it, and a data folder to put them in."""

from __future__ import annotations

import hashlib
import io
import os
import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np

from gossamer.store.catalog.door import Catalog
from gossamer.store.catalog.names import Ref
from gossamer.store.catalog.opening import Store
from gossamer.store.catalog.views import BaseInfo, FileInfo, Purpose, StoreLimits, VersionInfo
from gossamer.store.delta import Delta, DeltaSet
from gossamer.store.failpoints import Failpoint
from gossamer.store.files import Files
from gossamer.store.format import digest, write

ROOT = Path(__file__).parents[2]

BASE = BaseInfo(
    name="toy-base",
    fingerprint="sha256:" + hashlib.sha256(b"toy").hexdigest(),
    table={"a.weight": (64, 48), "b.weight": (32, 64)},
)
OTHER_BASE = BaseInfo(
    name="other-base",
    fingerprint="sha256:" + hashlib.sha256(b"other").hexdigest(),
    table=BASE.table,
)
#: A file to train on.
LINE = b'{"prompt": "a", "completion": "b"}\n'
#: A recovery under them spares nothing for being fresh.
IMPATIENT = StoreLimits(grace_s=-1)
#: What an upload, then a delete, of a file passes, in their order: its bytes go the way of an
#: adapter's; it is not validated, and registered by its own rows.
FILE_UPLOAD_POINTS = [
    Failpoint.UPLOAD_SPOOLING,
    Failpoint.UPLOAD_SPOOLED,
    Failpoint.UPLOAD_SYNCED,
    Failpoint.FILE_STAGING,
    Failpoint.FILE_STAGED,
    Failpoint.UPLOAD_RENAMED,
    Failpoint.UPLOAD_STORED,
    Failpoint.FILE_REGISTERING,
    Failpoint.FILE_REGISTERED,
]
FILE_DELETE_POINTS = [
    Failpoint.FILE_TOMBSTONING,
    Failpoint.FILE_TOMBSTONED,
    Failpoint.DELETE_CLAIMED,
    Failpoint.DELETE_UNLINKED,
    Failpoint.DELETE_COLLECTED,
]


class Clock:
    """A clock that moves only when told."""

    def __init__(self) -> None:
        self.now = datetime(2030, 1, 2, 3, 4, 5, 678901, tzinfo=UTC)

    def __call__(self) -> datetime:
        return self.now

    def advance(self, seconds: float) -> None:
        self.now += timedelta(seconds=seconds)


def make_deltas(seed: int, *, nnz: int = 200, fingerprint: str = BASE.fingerprint) -> DeltaSet:
    """A delta set over both weights of the toy base, another one for every seed."""
    random = np.random.default_rng(seed)
    deltas = {}
    for name, shape in BASE.table.items():
        positions = np.sort(random.choice(shape[0] * shape[1], nnz, replace=False))
        values = random.normal(size=nnz).astype(np.float32)
        deltas[name] = Delta.element(shape, positions, values, value_dtype="BF16")
    return DeltaSet(fingerprint, "toy-base" if fingerprint else "", deltas, {"seed": seed})


def make_file(seed: int, **options: Any) -> bytes:
    """The packed file of `make_deltas`."""
    file = io.BytesIO()
    write(make_deltas(seed, **options), file)
    return file.getvalue()


def make_digest(seed: int) -> str:
    """The digest of `make_deltas`."""
    return digest(make_deltas(seed))


@contextmanager
def opened(data: Path, tenants: tuple[str, ...] = ("acme",), **options: Any) -> Iterator[Store]:
    """The data folder's store in its server's role, with tenants."""
    with Store(data, options.pop("base", BASE), **{"owner": True, **options}) as store:
        known = store.catalog.tenants()
        for tenant in tenants:
            if tenant not in known:
                store.catalog.create_tenant(tenant)
        yield store
        store.catalog._holds.check_integrity()


def push(
    catalog: Catalog, name: str, seed: int, tenant: str = "acme", **options: Any
) -> VersionInfo:
    """Upload `make_file(seed)`."""
    return catalog.upload(tenant, name, [make_file(seed)], **options)


def meaning(catalog: Catalog, ref: str | Ref, tenant: str = "acme") -> str:
    """The digest that a reference stands for."""
    with catalog.resolve(tenant, [ref]) as resolution:
        return resolution.versions[0].digest


def push_file(
    files: Files,
    filename: str,
    data: bytes,
    tenant: str = "acme",
    purpose: Purpose = "fine-tune",
    **options: Any,
) -> FileInfo:
    """Upload `data` as a file."""
    with files.spool() as spool:
        spool.write(data)
        return files.upload(tenant, filename, purpose, spool, **options)


def read_file(files: Files, file: FileInfo | str, tenant: str = "acme", **options: Any) -> bytes:
    """The content of a file, given itself or its id."""
    file_id = file if isinstance(file, str) else file.id
    with files.content(tenant, file_id, **options) as path:
        return path.read_bytes()


def filenames(files: Files, **options: Any) -> list[str]:
    """The names on one page of acme's files."""
    return [f.filename for f in files.list("acme", **options).items]


def blob_path(data: Path, blob_id: str) -> Path:
    """Where a blob lies in a data folder."""
    return data / "store" / "blobs" / blob_id[:2] / blob_id


def flip_a_bit(path: Path) -> None:
    """Damage a file, in its middle."""
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 0x10
    path.write_bytes(data)


def stored_blobs(data: Path) -> set[str]:
    """The ids of all blobs in a data folder."""
    return {p.name for p in (data / "store" / "blobs").glob("*/*")}


def temp_files(data: Path) -> list[Path]:
    """The uploads' temp files in a data folder."""
    return sorted((data / "store" / "spool").iterdir())


def start_child(script: str, *arguments: str | Path) -> subprocess.Popen[str]:
    """Another Python that runs `script`, with this package importable and pipes on all three."""
    return subprocess.Popen(
        [sys.executable, "-c", script, *map(str, arguments)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )


def race(script: str, *arguments: str | Path, processes: int = 4) -> list[str]:
    """Run `script` in several processes at once. It prints a line when it is ready, then waits for
    a line; returns what each one printed after that."""
    children = [start_child(script, *arguments) for _ in range(processes)]
    for child in children:
        if child.stdout is None or child.stdout.readline() != "ready\n":
            raise RuntimeError(child.communicate()[1])
    for child in children:
        if child.stdin is not None:
            child.stdin.write("go\n")
            child.stdin.flush()
    answers = [child.communicate(timeout=120) for child in children]
    if any(child.returncode for child in children):
        raise RuntimeError("\n".join(error for _, error in answers))
    return [output for output, _ in answers]


def rows(data: Path, query: str) -> list[tuple[Any, ...]]:
    """Ask the SQLite file itself, past every layer of ours."""
    connection = sqlite3.connect(data / "registry.sqlite3")
    try:
        return connection.execute(query).fetchall()
    finally:
        connection.close()


def check_nothing_is_left_over(data: Path) -> None:
    """After a recovery without patience: exactly the blobs that versions and files name, and no
    temp file."""
    needed = {b for (b,) in rows(data, "SELECT blob_id FROM versions WHERE status = 'active'")}
    needed |= {b for (b,) in rows(data, "SELECT blob_id FROM files WHERE deleted_at IS NULL")}
    assert stored_blobs(data) == needed
    assert {b for (b,) in rows(data, "SELECT id FROM blobs")} == needed
    assert rows(data, "SELECT * FROM uploads") == []
    assert temp_files(data) == []
    assert rows(data, "PRAGMA integrity_check") == [("ok",)]
    assert rows(data, "PRAGMA foreign_key_check") == []
