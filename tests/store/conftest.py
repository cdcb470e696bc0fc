"""A store of its own for each test, and a bucket of its own for those that want one."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from gossamer.store.catalog.door import Catalog
from gossamer.store.catalog.opening import Store
from tests import s3
from tests.store.support import opened


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    """The owner of `tmp_path`, with the tenants acme and zeta."""
    with opened(tmp_path, ("acme", "zeta")) as store:
        yield store


@pytest.fixture
def catalog(store: Store) -> Catalog:
    """The catalog of `store`."""
    return store.catalog


@pytest.fixture(scope="session")
def s3_server() -> Iterator[s3.S3Server]:
    """A server that speaks S3's protocol."""
    with s3.serving() as server:
        yield server


@pytest.fixture
def bucket(s3_server: s3.S3Server, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The URL of an empty bucket, `blobs`, with what it takes to use it in the environment."""
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    for name, value in s3_server.environment().items():
        monkeypatch.setenv(name, value)
    s3_server.make_bucket("blobs")
    yield "s3://blobs/gossamer"
    s3_server.forget()
