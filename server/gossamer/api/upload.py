"""Receiving a file: straight from the socket into a spool.

At most a few MiB of an upload are in memory at any time, and writing and hashing happen in worker
threads. The fields beside the file may come before it or after it; each is checked when it has
come, so that a wrong one costs its sender no transfer.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
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
_FILE = "file"


@dataclass(frozen=True)
class FormField:
    """A field of text.

    Attributes:
        read: text → value; raises ApiError.
        default: the text that it has when it is left out; None: it must be given.
    """

    read: Callable[[str], Any] = str
    default: str | None = None


@dataclass(frozen=True)
class Form:
    """What an upload consists of, beside the part `file`.

    Attributes:
        refused: fields of other servers → why this one does not take them.
        raw: whether the file may also be the whole body, with the fields in the query.
    """

    fields: Mapping[str, FormField]
    refused: Mapping[str, str] = field(default_factory=dict)
    raw: bool = False

    def check_name(self, name: str | None) -> None:
        """Whether a field of this name, or the file, may be there.

        Raises:
            ApiError: 400
        """
        if name in self.fields or name == _FILE:
            return
        # The OpenAI client writes a field of a field as `expires_after[seconds]`.
        whole = (name or "").partition("[")[0]
        if whole in self.refused:
            raise invalid(whole, self.refused[whole], code="unknown_field")
        known = ", ".join(f"`{known}`" for known in self.fields)
        raise invalid(name or None, f"The form takes {known} and `file`.", code="unknown_field")

    def complete(self, values: dict[str, Any]) -> dict[str, Any]:
        """The values of all fields, with the defaults of those that were left out.

        Raises:
            ApiError: 400, one is missing.
        """
        for name, declared in self.fields.items():
            if name not in values:
                if declared.default is None:
                    raise _missing(name)
                values[name] = declared.read(declared.default)
        return values


@dataclass(frozen=True)
class Received:
    """An upload beside its bytes. `filename` is what the client calls the file, if it does."""

    values: Mapping[str, Any]
    filename: str | None = None


def read_boolean(name: str) -> Callable[[str], bool]:
    """How to read the field of that name as true or false."""
    values = {"true": True, "1": True, "false": False, "0": False}

    def read(text: str) -> bool:
        if text.lower() not in values:
            raise invalid(name, f"{name} is `true` or `false`.")
        return values[text.lower()]

    return read


async def receive_upload(
    request: Request, form: Form, spool: Spool, workers: Workers, most_fields: int
) -> Received:
    """Read the whole body into `spool`.

    Raises:
        ApiError: 400, the form or the query is not as it should be; 408 and 413 from the body.
        UploadTooLarge, StoreFull: from the spool.
    """
    kind, options = parse_options_header(request.headers.get("content-type", ""))
    if kind == b"multipart/form-data":
        parser = _Parser(form, options.get(b"boundary", b""), most_fields)
        async for chunk in request.stream():
            parser.feed(chunk)
            await _write(spool, workers, parser.pending)
        await _write(spool, workers, parser.pending, all_of_it=True)
        return parser.finish()
    if kind != b"application/octet-stream" or not form.raw:
        raise invalid("content-type", _how(form))
    received = Received(form.complete(_query(request, form)))
    pending = bytearray()
    async for chunk in request.stream():
        pending += chunk
        await _write(spool, workers, pending)
    await _write(spool, workers, pending, all_of_it=True)
    return received


async def _write(
    spool: Spool, workers: Workers, pending: bytearray, *, all_of_it: bool = False
) -> None:
    if len(pending) >= _BATCH or (all_of_it and pending):
        await workers.file(spool.write, bytes(pending))
        pending.clear()


def _how(form: Form) -> str:
    wanted = ", ".join(f"`{name}`" for name, f in form.fields.items() if f.default is None)
    way = f"Send multipart/form-data with {wanted} and `file`"
    return f"{way}, or application/octet-stream with {wanted} in the query." if form.raw else way


def _query(request: Request, form: Form) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for name, text in request.query_params.multi_items():
        if name not in form.fields or name in values:
            known = " and ".join(f"`{known}`" for known in form.fields)
            raise invalid(name, f"The query takes {known}, each once.")
        values[name] = form.fields[name].read(text)
    return values


@dataclass
class _Part:
    """The part of a form that is being read."""

    name: str | None = None
    filename: str | None = None
    value: bytearray = field(default_factory=bytearray)


class _Parser:
    """A streaming form with few fields and one file, whose bytes end up in `pending`."""

    def __init__(self, form: Form, boundary: bytes, most_fields: int) -> None:
        self.pending = bytearray()
        self._form = form
        self._most_fields = most_fields
        self._count = 0
        self._values: dict[str, Any] = {}
        self._file: _Part | None = None
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

    def finish(self) -> Received:
        """What has come, once the whole body is there."""
        if not self._complete:
            raise _malformed("its end is missing")
        values = self._form.complete(self._values)
        if self._file is None:
            raise _missing(_FILE)
        return Received(values, self._file.filename)

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
            if (filename := options.get(b"filename")) is not None:
                self._part.filename = filename.decode("utf-8", "replace")

    def _on_headers_finished(self) -> None:
        name = self._part.name
        self._form.check_name(name)
        if name in self._values or (name == _FILE and self._file is not None):
            raise invalid(name, f"The field {name!r} is there twice.")
        if name == _FILE:
            self._file = self._part

    def _on_data(self, data: bytes) -> None:
        if self._part is self._file:
            self.pending += data
            return
        self._part.value += data
        if len(self._part.value) > _LONGEST_FIELD:
            raise invalid(self._part.name, f"The field is longer than {_LONGEST_FIELD} bytes.")

    def _on_part_end(self) -> None:
        name = self._part.name
        if name is not None and self._part is not self._file:
            text = self._part.value.decode("utf-8", "replace")
            self._values[name] = self._form.fields[name].read(text)

    def _on_end(self) -> None:
        self._complete = True


def _missing(name: str) -> ApiError:
    return invalid(name, f"The field {name!r} is missing.", code="missing_field")


def _malformed(why: str) -> ApiError:
    return invalid(None, f"The multipart form is malformed: {why}.")
