"""Log lines: one a record, whatever is in it, and never a key."""

from __future__ import annotations

import io
import json
import logging
from collections.abc import Iterator
from pathlib import Path

import pytest

from gossamer.api.generation import Usage
from gossamer.api.logs import JsonFormatter, without_secrets

KEY = "sk-0123456789ab-" + "f0" * 32


@pytest.fixture
def lines() -> Iterator[tuple[logging.Logger, io.StringIO]]:
    stream = io.StringIO()
    handler = logging.StreamHandler(stream)
    handler.setFormatter(JsonFormatter())
    logger = logging.getLogger("tests.api.logs")
    logger.addHandler(handler)
    logger.propagate = False
    yield logger, stream
    logger.removeHandler(handler)
    logger.propagate = True


def test_text_of_a_client_cannot_begin_a_line(
    lines: tuple[logging.Logger, io.StringIO],
) -> None:
    logger, stream = lines
    evil = 'x\n{"level":"error","message":"forged"}\r\x1b[31m\u2028\u202e\x00'
    logger.warning("given %s", evil, extra={"model": evil})
    (line,) = stream.getvalue().splitlines()
    entry = json.loads(line)
    assert entry["message"] == f"given {evil}"
    assert entry["model"] == evil
    assert line.isascii()
    assert line.isprintable()


def test_a_key_is_blotted_out_wherever_it_stands(
    lines: tuple[logging.Logger, io.StringIO],
) -> None:
    logger, stream = lines
    try:
        raise ValueError(f"Authorization: Bearer {KEY}")
    except ValueError:
        logger.exception("with %s", KEY, extra={"headers": [("authorization", KEY)]})
    text = stream.getvalue()
    assert "f0f0" not in text
    assert "sk-0123456789ab-[redacted]" in text
    assert json.loads(text)["exception"]


def test_other_text_is_left_alone() -> None:
    text = "a task-id sk-1 and the bearer"
    assert without_secrets(text) == text


def test_a_dataclass_is_an_object_of_its_fields(
    lines: tuple[logging.Logger, io.StringIO],
) -> None:
    logger, stream = lines
    logger.warning("request", extra={"usage": Usage(3, 2, 1), "path": Path("a")})
    entry = json.loads(stream.getvalue())
    assert entry["usage"] == {"prompt": 3, "completion": 2, "cached": 1}
    assert entry["path"] == "a"
