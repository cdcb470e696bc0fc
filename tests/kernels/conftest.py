"""Fixtures of the kernels' tests."""

from __future__ import annotations

import pytest

from tests.kernels.cases import DEVICES


@pytest.fixture(params=DEVICES)
def device(request: pytest.FixtureRequest, interpreter: None) -> str:
    """Where a Triton kernel is tested."""
    del interpreter
    name: str = request.param
    return name
