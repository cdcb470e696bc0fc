"""Sending a stored file, held until the last byte is out or the client has gone."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any
from urllib.parse import quote

from starlette.requests import ClientDisconnect
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from gossamer.api.workers import Workers
from gossamer.store.spool import CHUNK


class FileReply(Response):
    """The reply; it leaves the context `opening` when it is done.

    Args:
        opening: entered already; it keeps the file at `path`.
        nbytes: of the file.
        filename: what the client shall call it; any text.
        headers: more of them.
        ended: called in the event loop when the file has been let go.
    """

    def __init__(
        self,
        opening: AbstractContextManager[Any],
        path: Path,
        nbytes: int,
        filename: str,
        headers: Mapping[str, str],
        workers: Workers,
        ended: Callable[[], None] = lambda: None,
    ) -> None:
        self.status_code = 200
        self.background = None
        self._nbytes = nbytes
        self.init_headers(
            {
                "content-type": "application/octet-stream",
                "content-length": str(nbytes),
                "content-disposition": attachment(filename),
                **headers,
            }
        )
        self._opening = opening
        self._path = path
        self._workers = workers
        self._ended = ended

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the file piece by piece."""
        del scope
        gone = asyncio.create_task(_disconnect(receive))
        try:
            await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
            file = await self._workers.file(self._path.open, "rb")
            with file:
                left = self._nbytes
                while left and (chunk := await self._workers.file(file.read, CHUNK)):
                    if gone.done():
                        raise ClientDisconnect
                    left -= len(chunk)
                    await send({"type": "http.response.body", "body": chunk, "more_body": True})
            await send({"type": "http.response.body", "body": b"", "more_body": False})
        finally:
            gone.cancel()
            # Not in the event loop: the end of a hold may wait for a lock.
            try:
                await asyncio.shield(self._workers.file(self._opening.__exit__, None, None, None))
            finally:
                self._ended()


def attachment(filename: str) -> str:
    """`content-disposition` for a file to be saved under that name (RFC 6266)."""
    quoted = quote(filename, safe="")
    if quoted == filename:
        return f'attachment; filename="{filename}"'
    return f"attachment; filename*=utf-8''{quoted}"


async def _disconnect(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
