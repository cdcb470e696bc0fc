"""One server process for all tests of commands that talk to one."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.cli.running import Live, serving


@pytest.fixture(scope="session")
def live(tiny_dir: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    """A server on a tiny Llama."""
    with serving(tiny_dir("llama"), tmp_path_factory.mktemp("live") / "data") as running:
        yield running


@pytest.fixture(autouse=True)
def _no_settings_of_the_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("URL", "API_KEY", "DATA_DIR", "BASE", "HOST", "PORT"):
        monkeypatch.delenv(f"GOSSAMER_{name}", raising=False)


@pytest.fixture
def logging_restored() -> Iterator[None]:
    """`up` and `worker` take the process's logging for themselves."""
    root = logging.getLogger()
    handlers, level = list(root.handlers), root.level
    yield
    root.handlers[:] = handlers
    root.setLevel(level)
