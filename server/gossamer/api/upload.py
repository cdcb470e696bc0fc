"""Receiving an adapter file: straight from the socket into the catalog's spool.

At most a few MiB of an upload are in memory at any time, and writing and hashing happen in worker
threads. The name may come before the file or after it.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header
from starlette.requests import Request

from gossamer.api.errors import ApiError, invalid
from gossamer.api.workers import Workers
from gossamer.store.spool import Spool

#: Collected before a switch to a thread that writes it: 1 MiB takes about 1 ms to hash and write.
_BATCH = 1 << 20
_LONGEST_FIELD = 4096
_FIELDS = frozenset({"name", "activate"})
_FILE = "file"
_BOOLEANS = {"true": True, "1": True, "false": False, "0": False}


@dataclass(frozen=True)
class Order:
    """What an upload asks for beside its bytes."""

    name: str
    activate: bool


async def receive_upload(
    request: Request, spool: Spool, workers: Workers, most_fields: int
) -> Order:
    """Read the whole body into `spool`.

    Raises:
        ApiError: 400, the form or the query is not as it should be; 408 and 413 from the body.
        UploadTooLarge, StoreFull: from the spool.
    """
    kind, options = parse_options_header(request.headers.get("content-type", ""))
    if kind == b"multipart/form-data":
        form = _Form(options.get(b"boundary", b""), most_fields)
        async for chunk in request.stream():
            form.feed(chunk)
            await _write(spool, workers, form.pending)
        await _write(spool, workers, form.pending, all_of_it=True)
        return _order(form.finish())
    if kind != b"application/octet-stream":
        raise invalid(
            "content-type",
            "Send multipart/form-data with `name` and `file`, "
            "or application/octet-stream with ?name=….",
        )
    order = _order(_query(request))
    pending = bytearray()
    async for chunk in request.stream():
        pending += chunk
        await _write(spool, workers, pending)
    await _write(spool, workers, pending, all_of_it=True)
    return order


async def _write(
    spool: Spool, workers: Workers, pending: bytearray, *, all_of_it: bool = False
) -> None:
    if len(pending) >= _BATCH or (all_of_it and pending):
        await workers.file(spool.write, bytes(pending))
        pending.clear()


def _query(request: Request) -> dict[str, str]:
    fields: dict[str, str] = {}
    for name, value in request.query_params.multi_items():
        if name not in _FIELDS or name in fields:
            raise invalid(name, "The query takes `name` and `activate`, each once.")
        fields[name] = value
    return fields


def _order(fields: dict[str, str]) -> Order:
    name = fields.get("name")
    if name is None:
        raise invalid("name", "The field 'name' is missing.", code="missing_field")
    activate = _BOOLEANS.get(fields.get("activate", "true").lower())
    if activate is None:
        raise invalid("activate", "activate is `true` or `false`.")
    return Order(name, activate)


@dataclass
class _Part:
    """The part of a form that is being read."""

    name: str | None = None
    value: bytearray = field(default_factory=bytearray)


class _Form:
    """A streaming form with few fields and one file, whose bytes end up in `pending`."""

    def __init__(self, boundary: bytes, most_fields: int) -> None:
        self.pending = bytearray()
        self._most_fields = most_fields
        self._count = 0
        self._fields: dict[str, str] = {}
        self._seen_file = False
        self._complete = False
        self._part = _Part()
        self._header = [bytearray(), bytearray()]
        if not boundary:
            raise _malformed("it has no boundary")
        callbacks: Any = {
            "on_part_begin": self._on_part_begin,
            "on_header_field": lambda data, start, end: self._on_header(0, data[start:end]),
            "on_header_value": lambda data, start, end: self._on_header(1, data[start:end]),
            "on_header_end": self._on_header_end,
            "on_headers_finished": self._on_headers_finished,
            "on_part_data": lambda data, start, end: self._on_data(data[start:end]),
            "on_part_end": self._on_part_end,
            "on_end": self._on_end,
        }
        try:
            self._parser = MultipartParser(boundary, callbacks)
        except FormParserError as error:
            raise _malformed(str(error)) from error

    def feed(self, chunk: bytes) -> None:
        """Parse some more of the body."""
        try:
            self._parser.write(chunk)
        except FormParserError as error:
            raise _malformed("its parts cannot be told apart") from error

    def finish(self) -> dict[str, str]:
        """The fields, once the whole body is there."""
        if not self._complete:
            raise _malformed("its end is missing")
        if not self._seen_file:
            raise invalid("file", "The field 'file' is missing.", code="missing_field")
        return self._fields

    def _on_part_begin(self) -> None:
        self._count += 1
        if self._count > self._most_fields:
            raise invalid(None, f"A form has at most {self._most_fields} fields.")
        self._part = _Part()

    def _on_header(self, which: int, data: bytes) -> None:
        self._header[which] += data

    def _on_header_end(self) -> None:
        name, value = (bytes(part) for part in self._header)
        self._header = [bytearray(), bytearray()]
        if name.lower() == b"content-disposition":
            _, options = parse_options_header(value)
            self._part.name = options.get(b"name", b"").decode("utf-8", "replace")

    def _on_headers_finished(self) -> None:
        name = self._part.name
        if name is None or name not in {*_FIELDS, _FILE}:
            raise invalid(name or None, "The form takes `name`, `activate` and `file`.")
        if name in self._fields or (name == _FILE and self._seen_file):
            raise invalid(name, f"The field {name!r} is there twice.")
        self._seen_file = self._seen_file or name == _FILE

    def _on_data(self, data: bytes) -> None:
        if self._part.name == _FILE:
            self.pending += data
            return
        self._part.value += data
        if len(self._part.value) > _LONGEST_FIELD:
            raise invalid(self._part.name, f"The field is longer than {_LONGEST_FIELD} bytes.")

    def _on_part_end(self) -> None:
        name = self._part.name
        if name is not None and name != _FILE:
            self._fields[name] = self._part.value.decode("utf-8", "replace")

    def _on_end(self) -> None:
        self._complete = True


def _malformed(why: str) -> ApiError:
    return invalid(None, f"The multipart form is malformed: {why}.")
