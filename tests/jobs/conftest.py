"""A bench of its own for each test."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.jobs.support import Bench, benched


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[Bench]:
    """As `benched` makes it, with the limits of a server."""
    with benched(tmp_path) as bench:
        yield bench
