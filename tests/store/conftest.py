"""A store of its own for each test."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from gossamer.store.catalog.door import Catalog
from gossamer.store.catalog.opening import Store
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
