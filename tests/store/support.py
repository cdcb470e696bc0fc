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
from gossamer.store.catalog.opening import Store
from gossamer.store.catalog.views import BaseInfo, FileInfo, Purpose, VersionInfo
from gossamer.store.delta import Delta, DeltaSet
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


def blob_path(data: Path, blob_id: str) -> Path:
    """Where a blob lies in a data folder."""
    return data / "store" / "blobs" / blob_id[:2] / blob_id


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
