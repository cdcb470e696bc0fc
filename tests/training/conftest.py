"""Fixtures of the training room."""

from __future__ import annotations

import gc
from collections.abc import Iterator

import pytest


@pytest.fixture(scope="package", autouse=True)
def _still_heap() -> Iterator[None]:
    """accelerate collects garbage at the start of each phase: 0.3 s with all that the training
    stack has imported, and 30 ms without. This room's tests have some hundred phases."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()
