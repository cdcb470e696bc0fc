"""One server for all tests of the HTTP surface that do not need settings of their own."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from tests.api.running import Running


@pytest.fixture(scope="session")
def api_base(tiny_dir: Callable[..., Path]) -> Path:
    """The directory of a tiny Llama with a tokenizer and a chat template."""
    return tiny_dir("llama")


@pytest.fixture(scope="session")
def api(api_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """A server with default limits; its tenant `default` has the adapters `sql` and `math`."""
    from tests.api.running import running

    with running(api_base, tmp_path_factory.mktemp("api")) as server:
        server.upload("sql", 1)
        server.upload("math", 2)
        yield server
