"""Fixtures of the worker's tests."""

from __future__ import annotations

from collections.abc import Iterator

import pytest


@pytest.fixture(scope="package", autouse=True)
def _still_heap() -> Iterator[None]:
    from tests.worker.support import still_heap

    with still_heap():
        yield
