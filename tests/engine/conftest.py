"""Fixtures of the engine's tests. What is heavy loads only when one of them is used."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from gossamer.engine.grammar import TokenizerInfo


@pytest.fixture(scope="module")
def info() -> Iterator[TokenizerInfo]:
    """A tokenizer that constraints are compiled for, by a process of its own."""
    from gossamer.engine.grammar import tokenizer_info
    from tests.engine.constraining import PADDED, TOKENIZER

    made = tokenizer_info(TOKENIZER, PADDED)
    yield made
    made.sandbox.close()
