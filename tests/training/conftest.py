"""Fixtures of the training room."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from gossamer.base.load import BaseFiles


@pytest.fixture(scope="package", autouse=True)
def _still_heap() -> Iterator[None]:
    """accelerate collects garbage at the start of each phase: 0.3 s with all that the training
    stack has imported, and 30 ms without. This room's tests have some hundred phases."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture(scope="session")
def base(tiny_dir: Callable[..., Path]) -> BaseFiles:
    """A tiny llama."""
    from tests.training.support import tiny_base

    return tiny_base(tiny_dir("llama"))


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dozen examples of a rule that a few steps learn."""
    from tests.training.support import counting_examples, write_jsonl

    return write_jsonl(tmp_path_factory.mktemp("data") / "data.jsonl", counting_examples(12))
