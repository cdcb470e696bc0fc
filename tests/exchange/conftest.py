"""The tiny base of the exchange's tests."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.exchange.support import TinyBase


@pytest.fixture(scope="session")
def tiny_base(tiny_dir: Callable[..., Path]) -> TinyBase:
    """A tiny Llama whose output projection is its own, with its files; never write into them."""
    return TinyBase.at(tiny_dir("llama"))


@pytest.fixture(scope="session")
def tied_base(tiny_dir: Callable[..., Path]) -> TinyBase:
    """A tiny Llama whose output projection is its embedding, with its files."""
    return TinyBase.at(tiny_dir("llama", tied=True))
