"""One server process for all tests of commands that talk to one, and who works for it."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.api.hand import at_hand
from tests.cli.jobs import LiveHand
from tests.cli.running import Live, serving
from tests.training.support import counting_examples, write_jsonl


@pytest.fixture(scope="session")
def live(tiny_dir: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    """A server on a tiny Llama."""
    with serving(tiny_dir("llama"), tmp_path_factory.mktemp("live") / "data") as running:
        yield running


@pytest.fixture
def hand(live: Live) -> Iterator[LiveHand]:
    """A worker by hand on the live server's queue, which it leaves empty."""
    with at_hand(live.data_dir, live.info()) as worker:
        hand = LiveHand(live, worker)
        yield hand
        for job in hand.backlog.list("default", limit=1000).items:
            is_finished = job.status in ("succeeded", "failed", "cancelled")
            if not is_finished and hand.backlog.cancel("default", job.id).status == "running":
                hand.backlog.cancelled(hand.held)


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """A few examples to train on."""
    return write_jsonl(tmp_path / "examples.jsonl", counting_examples())


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
