"""A Hub on localhost: what huggingface_hub asks of the real one for a model, and its faults."""

from __future__ import annotations

import hashlib
import json
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import TracebackType
from typing import Any
from urllib.parse import unquote, urlsplit

#: Which files a repository keeps with Git LFS; the Hub knows the sha256 of those alone.
LFS = (".safetensors", ".bin", ".model")


@dataclass
class HubServer:
    """Serves one repository at one commit, which is what `main` has; use as a context manager.

    Attributes:
        files: name → content, as listed.
        sent: name → content that is sent in place of the listed one.
        sizes: name → size that is listed in place of the real one.
        refusal: (status, X-Error-Code) of every answer.
        page: every question is answered with this text.
        token: without it, 401 as for a repository that is not there.
        halfway: the name of a file of which half is sent, until `go_on` is set; `waiting` tells.
        commit: the only one there is.
        listed_as: the commit that a listing claims to be of; None for the true one.
        requests: method and path of every request.
        tokens: the Authorization headers that came.
    """

    files: dict[str, bytes]
    repository: str = "someone/some-model"
    commit: str = "0123456789abcdef0123" * 2
    sent: dict[str, bytes] = field(default_factory=dict)
    sizes: dict[str, int] = field(default_factory=dict)
    refusal: tuple[int, str] | None = None
    page: str | None = None
    token: str | None = None
    halfway: str | None = None
    listed_as: str | None = None
    waiting: threading.Event = field(default_factory=threading.Event)
    go_on: threading.Event = field(default_factory=threading.Event)
    requests: list[tuple[str, str]] = field(default_factory=list)
    tokens: set[str | None] = field(default_factory=set)

    @classmethod
    def of(cls, folder: Path, **options: Any) -> HubServer:
        """Serves the files of a directory."""
        return cls({path.name: path.read_bytes() for path in folder.iterdir()}, **options)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._server.server_port}"

    @property
    def spec(self) -> str:
        return f"{self.repository}@{self.commit}"

    @property
    def fetched(self) -> list[str]:
        """The files that were fetched, in their order."""
        return [
            path.rpartition("/")[2]
            for method, path in self.requests
            if "/resolve/" in path and method == "GET"
        ]

    def __enter__(self) -> HubServer:
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
        self.go_on.set()
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def _handler(self) -> type[BaseHTTPRequestHandler]:
        hub = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                hub._answer(self, unquote(urlsplit(self.path).path))

            def do_HEAD(self) -> None:
                self.do_GET()

            def log_message(self, format: str, *args: object) -> None:  # noqa: A002
                pass

        return Handler

    def _answer(self, request: BaseHTTPRequestHandler, path: str) -> None:
        self.requests.append((request.command, path))
        given = request.headers.get("Authorization")
        self.tokens.add(given)
        if self.page is not None:
            return _reply(request, 200, self.page.encode(), {"Content-Type": "text/html"})
        if self.refusal is not None:
            return _refuse(request, *self.refusal)
        if self.token is not None and given != f"Bearer {self.token}":
            return _refuse(request, 401, "RepoNotFound")
        api, files = f"/api/models/{self.repository}", f"/{self.repository}/resolve/"
        if path == api or path.startswith(api + "/revision/"):
            revision = path.removeprefix(api).removeprefix("/revision/") or "main"
            return self._listing(request, revision)
        if path.startswith(files):
            revision, _, name = path.removeprefix(files).partition("/")
            return self._file(request, revision, name)
        return _refuse(request, 404, "RepoNotFound")

    def _listing(self, request: BaseHTTPRequestHandler, revision: str) -> None:
        if revision not in ("main", self.commit):
            return _refuse(request, 404, "RevisionNotFound")
        entries: list[dict[str, Any]] = [{"rfilename": "folder/x.safetensors", "size": 7}]
        for name, content in self.files.items():
            size = self.sizes.get(name, len(content))
            entry: dict[str, Any] = {"rfilename": name, "size": size, "blobId": "0" * 40}
            if name.endswith(LFS):
                sha256 = hashlib.sha256(content).hexdigest()
                entry["lfs"] = {"sha256": sha256, "size": size, "pointerSize": 134}
            entries.append(entry)
        if "blobs=" not in request.path:
            entries = [{"rfilename": entry["rfilename"]} for entry in entries]
        document = {
            "id": self.repository,
            "sha": self.listed_as or self.commit,
            "siblings": entries,
        }
        kind = {"Content-Type": "application/json"}
        return _reply(request, 200, json.dumps(document).encode(), kind)

    def _file(self, request: BaseHTTPRequestHandler, revision: str, name: str) -> None:
        if revision != self.commit:
            return _refuse(request, 404, "RevisionNotFound")
        if name not in self.files:
            return _refuse(request, 404, "EntryNotFound")
        body = self.sent.get(name, self.files[name])
        etag = hashlib.sha256(self.files[name]).hexdigest()
        headers = {"ETag": f'"{etag}"', "X-Repo-Commit": self.commit}
        if name.endswith(LFS):
            headers |= {"X-Linked-Etag": f'"{etag}"', "X-Linked-Size": str(len(body))}
        if name != self.halfway or request.command == "HEAD":
            return _reply(request, 200, body, headers)
        _reply(request, 200, body[: len(body) // 2], headers, length=len(body))
        self.waiting.set()
        self.go_on.wait()
        return None


def _refuse(request: BaseHTTPRequestHandler, status: int, code: str) -> None:
    _reply(request, status, b"", {"X-Error-Code": code, "X-Error-Message": "no"})


def _reply(
    request: BaseHTTPRequestHandler,
    status: int,
    body: bytes,
    headers: dict[str, str],
    *,
    length: int | None = None,
) -> None:
    request.send_response(status)
    for name, value in headers.items():
        request.send_header(name, value)
    request.send_header("Content-Length", str(len(body) if length is None else length))
    request.end_headers()
    if request.command != "HEAD":
        request.wfile.write(body)
        request.wfile.flush()
