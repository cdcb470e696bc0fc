"""A package index on localhost, with the habits and the faults of real ones."""

from __future__ import annotations

import hashlib
import json
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType

from gossamer.base.fetch import SIMPLE_JSON, IndexFile


@dataclass
class IndexServer:
    """Serves one file of one project through the simple JSON API; use as a context manager.

    Attributes:
        cuts: for each transfer in turn, after how many bytes the connection drops (None: never).
        ranges: whether Range is honoured.
        sent: what the file's URL yields, when not the file itself.
        declared: the sha256 on the project's page; None leaves it out.
        file_status: the status of the file's URL.
        html: the project's page is HTML.
        transfers: the Range header of every request for the file (None: without).
        pages: how often the project's page was asked for.
    """

    project: str
    filename: str
    content: bytes
    cuts: list[int | None] = field(default_factory=list)
    ranges: bool = True
    sent: bytes | None = None
    declared: str | None = ""
    file_status: int = 200
    html: bool = False
    transfers: list[str | None] = field(default_factory=list)
    pages: int = 0

    @property
    def pin(self) -> IndexFile:
        sha256 = hashlib.sha256(self.content).hexdigest()
        return IndexFile(self.project, self.filename, sha256, len(self.content))

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._server.server_port}/simple/"

    def __enter__(self) -> IndexServer:
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        self._server.daemon_threads = True
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.02,))
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def _handler(self) -> type[BaseHTTPRequestHandler]:
        index = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                if self.path == f"/simple/{index.project}/":
                    index.pages += 1
                    index._page(self)
                elif self.path == f"/files/{index.filename}":
                    index.transfers.append(self.headers.get("Range"))
                    index._file(self)
                else:
                    self.send_error(404)

            def log_message(self, format: str, *args: object) -> None:  # noqa: A002
                pass

        return Handler

    def _page(self, request: BaseHTTPRequestHandler) -> None:
        if self.html or request.headers.get("Accept") != SIMPLE_JSON:
            return _reply(request, 200, b"<!DOCTYPE html><a href=x>x</a>", "text/html")
        sha256 = self.pin.sha256 if self.declared == "" else self.declared
        entry = {
            "filename": self.filename,
            "url": f"../../files/{self.filename}",
            "hashes": {"sha256": sha256} if sha256 else {},
        }
        page = {"meta": {"api-version": "1.1"}, "name": self.project, "files": [entry]}
        return _reply(request, 200, json.dumps(page).encode(), SIMPLE_JSON)

    def _file(self, request: BaseHTTPRequestHandler) -> None:
        if self.file_status != 200:
            return request.send_error(self.file_status)
        body = self.content if self.sent is None else self.sent
        asked = request.headers.get("Range")
        start = int(asked.removeprefix("bytes=").removesuffix("-")) if asked else 0
        cut = self.cuts.pop(0) if self.cuts else None
        if start >= len(body):
            return request.send_error(416)
        if asked and self.ranges:
            request.send_response(206)
            request.send_header("Content-Range", f"bytes {start}-{len(body) - 1}/{len(body)}")
            body = body[start:]
        else:
            request.send_response(200)
        request.send_header("Content-Length", str(len(body)))
        request.end_headers()
        request.wfile.write(body if cut is None else body[:cut])
        request.close_connection = True
        return None


def _reply(request: BaseHTTPRequestHandler, status: int, body: bytes, kind: str) -> None:
    request.send_response(status)
    request.send_header("Content-Type", kind)
    request.send_header("Content-Length", str(len(body)))
    request.end_headers()
    request.wfile.write(body)
