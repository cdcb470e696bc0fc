"""Logs: one JSON object a line, with no key in it and no line of a client's making."""

from __future__ import annotations

import json
import logging
import re
from dataclasses import asdict, is_dataclass
from datetime import UTC, datetime
from typing import Any, TextIO

#: `sk-<id>-<secret>` and bearer tokens of any make: anywhere in a line they are blotted out.
_SECRETS = re.compile(
    r"(sk-[A-Za-z0-9]{1,64}-)[A-Za-z0-9_\-=+/]{8,}|((?i:bearer)\s+)[\w.~+/=\-]{16,}"
)
_STANDARD = set(vars(logging.makeLogRecord({}))) | {"message", "asctime", "color_message"}


class JsonFormatter(logging.Formatter):
    """A record as one line of ASCII JSON: `ts`, `level`, `logger`, `message` and its extras.

    Control characters, line ends among them, are escaped by JSON itself, so that text of a client
    cannot begin a line of its own.
    """

    def format(self, record: logging.LogRecord) -> str:
        """The record as one line."""
        entry: dict[str, Any] = {
            "ts": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        extras = vars(record).items()
        entry |= {name: value for name, value in extras if name not in _STANDARD}
        if record.exc_info:
            entry["exception"] = self.formatException(record.exc_info)
        return without_secrets(json.dumps(entry, default=_plain))


def _plain(value: object) -> object:
    return asdict(value) if is_dataclass(value) and not isinstance(value, type) else str(value)


def without_secrets(text: str) -> str:
    """`text` with every API key in it blotted out."""
    return _SECRETS.sub(lambda match: (match[1] or match[2]) + "[redacted]", text)


def configure_logging(level: str, stream: TextIO | None = None) -> None:
    """Send every logger's records to `stream` (default: standard error) as JSON lines."""
    handler = logging.StreamHandler(stream)
    handler.setFormatter(JsonFormatter())
    logging.basicConfig(handlers=[handler], level=level.upper(), force=True)
    # uvicorn tells of each start, stop and malformed request; sqlalchemy and httpx of each call.
    for name in ("uvicorn", "sqlalchemy.engine", "httpx", "alembic"):
        logging.getLogger(name).setLevel(max(logging.WARNING, logging.root.level))
