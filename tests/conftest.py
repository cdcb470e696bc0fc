"""Fixtures shared by all rooms. torch and transformers load only when one of them is used."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.interpreting import choose_interpreter, mend_interpreter

if TYPE_CHECKING:
    from gossamer.base.load import BaseFiles

choose_interpreter()


# A shell starts what runs in its background with interrupts ignored, and a process hands that on to
# those that it starts: the tests that send one would wait for ever.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def interpreter() -> None:
    """Triton's interpreter, computing as a card does; for tests of the Triton backend."""
    mend_interpreter()


@pytest.fixture(scope="session")
def test_cache() -> Path:
    """What tests fetch once and keep: `$GOSSAMER_TEST_CACHE` or ~/.cache/gossamer/tests."""
    given = os.environ.get("GOSSAMER_TEST_CACHE")
    return Path(given) if given else Path.home() / ".cache" / "gossamer" / "tests"


@pytest.fixture(scope="session")
def smollm2(test_cache: Path) -> BaseFiles:
    """The real SmolLM2-135M, fetched and converted on the machine's first run only."""
    from gossamer.base.sources import open_base

    return open_base("smollm2-135m", test_cache)


@pytest.fixture(scope="session")
def smollm2_dir(smollm2: BaseFiles) -> Path:
    """The Hugging Face directory of the real SmolLM2-135M (float32)."""
    return smollm2.path


@pytest.fixture(scope="session")
def tiny_dir(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """`tiny_dir(arch, tied=None, seed=0)` → a Hugging Face directory of `tests.tiny`, made once.

    Shared by the whole run: never write into it.
    """
    from tests.tiny import save_tiny, tiny_model

    made: dict[tuple[str, bool | None, int], Path] = {}

    def directory(arch: str, tied: bool | None = None, seed: int = 0) -> Path:
        key = (arch, tied, seed)
        if key not in made:
            model = tiny_model(arch, tied=tied, seed=seed)
            made[key] = save_tiny(model, tmp_path_factory.mktemp(f"tiny-{arch}"))
        return made[key]

    return directory
