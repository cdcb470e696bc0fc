"""uvicorn's HTTP/1.1 protocol with the bounds that it leaves open.

httptools has no cap on a request's headers, and uvicorn arms no timer before the first request of a
connection, so that one client can hold sockets and memory for nothing. A client that stops reading
holds its transport's buffer for as long as TCP allows: an ASGI application cannot abort it.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from functools import partial
from http import HTTPStatus
from typing import Any, ClassVar

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from gossamer.api.settings import Limits


class _Timer:
    """One pending call of an event loop, or none."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._handle: asyncio.TimerHandle | None = None

    @property
    def armed(self) -> bool:
        return self._handle is not None

    def start(self, seconds: float, callback: Callable[[], None]) -> None:
        self.stop()
        self._handle = self._loop.call_later(seconds, callback)

    def stop(self) -> None:
        if self._handle is not None:
            self._handle.cancel()
            self._handle = None


class BoundedHttp(HttpToolsProtocol):
    """Make one with `bounded(limits)`; the class attribute is what uvicorn cannot pass in."""

    limits: ClassVar[Limits] = Limits()

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        # uvicorn writes its own line, with the path and the query, when any handler would take it.
        self.access_log = False
        self._headers_due = _Timer(self.loop)
        self._reader_due = _Timer(self.loop)
        self._header_bytes = 0

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Refuse a connection past the limit; give the others some time for their headers."""
        super().connection_made(transport)
        if len(self.connections) > self.limits.connections:
            self._refuse(503, "Too many connections.")
        else:
            self._await_headers()

    def connection_lost(self, exc: Exception | None) -> None:
        """Stop the timers of the connection."""
        self._headers_due.stop()
        self._reader_due.stop()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Parse, and start the clock when this is the beginning of a request's headers.

        The clock starts here and not in `on_message_begin`: a lone line end begins no message, but
        stops uvicorn's keep-alive timer. It is never restarted by the bytes that follow.
        """
        if self.transport.is_closing():
            return
        super().data_received(data)
        if self._idle() and not self._headers_due.armed and not self.transport.is_closing():
            self._await_headers()

    def on_message_begin(self) -> None:
        """A request begins, and with it the count of its headers."""
        super().on_message_begin()
        self._header_bytes = 0

    def on_url(self, url: bytes) -> None:
        """Count the request line as part of the headers."""
        self._count(len(url))
        super().on_url(url)

    def on_header(self, name: bytes, value: bytes) -> None:
        """Count a header; past the limits the request is refused with 431."""
        # The 4 are `: ` and the line end: empty headers are not free.
        self._count(len(name) + len(value) + 4)
        if len(self.headers) >= self.limits.headers:
            self._refuse(431, "Too many header fields.")
        super().on_header(name, value)

    def on_headers_complete(self) -> None:
        """The headers came in time; a refused request runs no application."""
        self._headers_due.stop()
        if not self.transport.is_closing():
            super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        """As the base class, unless the request was refused."""
        if not self.transport.is_closing():
            super().on_body(body)

    def on_message_complete(self) -> None:
        """As the base class, unless the request was refused."""
        if not self.transport.is_closing():
            super().on_message_complete()

    def pause_writing(self) -> None:
        """The client has stopped reading: the connection is aborted unless it goes on in time."""
        super().pause_writing()
        self._reader_due.start(self.limits.write_stall_seconds, self.transport.abort)

    def resume_writing(self) -> None:
        """The client reads again."""
        self._reader_due.stop()
        super().resume_writing()

    def _idle(self) -> bool:
        return self.cycle is None or self.cycle.response_complete

    def _await_headers(self) -> None:
        refuse = partial(self._refuse, 408, "The headers took too long.")
        self._headers_due.start(self.limits.header_seconds, refuse)

    def _count(self, nbytes: int) -> None:
        self._header_bytes += nbytes
        if self._header_bytes > self.limits.header_bytes:
            self._refuse(431, "The header fields are too large.")

    def _refuse(self, status: int, message: str) -> None:
        if self.transport.is_closing():
            return
        # The refused request may be pipelined behind one whose answer is being written: then there
        # is no place for an answer of its own.
        if self._idle():
            body = json.dumps(
                {"error": {"message": message, "type": "invalid_request_error", "param": None}}
            ).encode()
            self.transport.write(
                b"HTTP/1.1 %d %s\r\ncontent-type: application/json\r\ncontent-length: %d\r\n"
                b"connection: close\r\n\r\n%s"
                % (status, HTTPStatus(status).phrase.encode(), len(body), body)
            )
        self.transport.close()


def bounded(limits: Limits) -> type[BoundedHttp]:
    """The protocol class with these limits."""
    return type("BoundedHttp", (BoundedHttp,), {"limits": limits})
