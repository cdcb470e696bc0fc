"""Receiving files: straight from the socket into spools.

At most a few MiB of an upload are in memory at any time, and writing and hashing happen in worker
threads. The fields beside the files may come before them or after them; each is checked when it has
come, so that a wrong one costs its sender no transfer.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header
from starlette.requests import Request

from gossamer.api.errors import ApiError, invalid
from gossamer.api.spools import Spools
from gossamer.api.workers import Workers

#: Collected before a switch to a thread that writes it: 1 MiB takes about 1 ms to hash and write.
_BATCH = 1 << 20
_LONGEST_FIELD = 4096
_LONGEST_FILENAME = 255
_FILE = "file"
_BAD_FILENAME = "invalid_filename"
#: what a part with one of several files may be called
_FILES = (_FILE, "files")


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
        most_files: how many files there may be. Where that is more than one, a part with a file may
            be called `files` too, and of several each has a filename of its own.
    """

    fields: Mapping[str, FormField]
    refused: Mapping[str, str] = field(default_factory=dict)
    raw: bool = False
    most_files: int = 1

    def is_file(self, name: str | None) -> bool:
        """Whether a part of this name is a file."""
        return name == _FILE or (self.most_files > 1 and name in _FILES)

    def check_name(self, name: str | None) -> None:
        """Whether a field of this name, or a file, may be there.

        Raises:
            ApiError: 400
        """
        if name in self.fields or self.is_file(name):
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

    def check_files(self, filenames: Sequence[str | None]) -> None:
        """Whether these files may be there together; of one alone the name does not matter here.

        Raises:
            ApiError: 400
        """
        if len(filenames) <= 1:
            return
        if self.most_files == 1:
            raise invalid(_FILE, f"The field {_FILE!r} is there twice.")
        if len(filenames) > self.most_files:
            raise invalid(_FILE, f"A form has at most {self.most_files} files.")
        if why := next(filter(None, map(_filename_problem, filenames)), None):
            raise invalid(_FILE, f"Of several files each needs a name: {why}.", code=_BAD_FILENAME)
        if len(set(filenames)) < len(filenames):
            raise invalid(_FILE, "Two files have the same name.", code=_BAD_FILENAME)


def _filename_problem(filename: str | None) -> str | None:
    """Why a name cannot be that of one of several files."""
    if not filename:
        return "one has none"
    if len(filename.encode("utf-8")) > _LONGEST_FILENAME:
        return f"one has more than {_LONGEST_FILENAME} bytes"
    if filename in (".", "..") or any(mark in filename for mark in "/\\\0"):
        return "a folder is no part of it"
    return None


@dataclass(frozen=True)
class Received:
    """An upload beside its bytes. `filenames` are what the client calls the files, where it does;
    they lie in the spools in the same order."""

    values: Mapping[str, Any]
    filenames: tuple[str | None, ...]


def read_boolean(name: str) -> Callable[[str], bool]:
    """How to read the field of that name as true or false."""
    values = {"true": True, "1": True, "false": False, "0": False}

    def read(text: str) -> bool:
        if text.lower() not in values:
            raise invalid(name, f"{name} is `true` or `false`.")
        return values[text.lower()]

    return read


async def receive_upload(
    request: Request, form: Form, spools: Spools, workers: Workers, most_fields: int
) -> Received:
    """Read the whole body, its files into `spools`.

    Raises:
        ApiError: 400, the form or the query is not as it should be; 408 and 413 from the body.
        UploadTooLarge, StoreFull: from the spools.
    """
    kind, options = parse_options_header(request.headers.get("content-type", ""))
    if kind == b"multipart/form-data":
        parser = _Parser(form, options.get(b"boundary", b""), most_fields)
        async for chunk in request.stream():
            parser.feed(chunk)
            await _write(spools, workers, parser.pending)
        await _write(spools, workers, parser.pending, all_of_it=True)
        return parser.finish()
    if kind != b"application/octet-stream" or not form.raw:
        raise invalid("content-type", _how(form))
    received = Received(form.complete(_query(request, form)), (None,))
    body = bytearray()
    pending = [(0, body)]
    async for chunk in request.stream():
        body += chunk
        await _write(spools, workers, pending)
    await _write(spools, workers, pending, all_of_it=True)
    return received


async def _write(
    spools: Spools,
    workers: Workers,
    pending: list[tuple[int, bytearray]],
    *,
    all_of_it: bool = False,
) -> None:
    """Write what is pending when it is much, or the last; an empty piece of the last file stays."""
    if not pending or (sum(len(data) for _, data in pending) < _BATCH and not all_of_it):
        return
    await workers.file(spools.write, [(index, bytes(data)) for index, data in pending])
    del pending[:-1]
    pending[0][1].clear()


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
    """A streaming form with few fields and files, whose bytes end up in `pending`: some of each
    file, by its place, in the order in which they came. The last one is still being read."""

    def __init__(self, form: Form, boundary: bytes, most_fields: int) -> None:
        self.pending: list[tuple[int, bytearray]] = []
        self._form = form
        self._most_parts = most_fields + form.most_files - 1
        self._count = 0
        self._values: dict[str, Any] = {}
        self._files: list[_Part] = []
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
        if not self._files:
            raise _missing(_FILE)
        return Received(values, tuple(part.filename for part in self._files))

    def _on_part_begin(self) -> None:
        self._count += 1
        if self._count > self._most_parts:
            raise invalid(None, f"A form has at most {self._most_parts} fields.")
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
        if name in self._values:
            raise invalid(name, f"The field {name!r} is there twice.")
        if self._form.is_file(name):
            self._files.append(self._part)
            self._form.check_files([part.filename for part in self._files])
            self.pending.append((len(self._files) - 1, bytearray()))

    def _on_data(self, data: bytes) -> None:
        if self._is_file:
            self.pending[-1][1].extend(data)
            return
        self._part.value += data
        if len(self._part.value) > _LONGEST_FIELD:
            raise invalid(self._part.name, f"The field is longer than {_LONGEST_FIELD} bytes.")

    def _on_part_end(self) -> None:
        name = self._part.name
        if name is not None and not self._is_file:
            text = self._part.value.decode("utf-8", "replace")
            self._values[name] = self._form.fields[name].read(text)

    @property
    def _is_file(self) -> bool:
        """Whether the part that is being read is a file."""
        return bool(self._files) and self._part is self._files[-1]

    def _on_end(self) -> None:
        self._complete = True


def _missing(name: str) -> ApiError:
    return invalid(name, f"The field {name!r} is missing.", code="missing_field")


def _malformed(why: str) -> ApiError:
    return invalid(None, f"The multipart form is malformed: {why}.")
