"""Sending a stored adapter file, held until the last byte is out or the client has gone."""

from __future__ import annotations

import asyncio
from contextlib import AbstractContextManager

from starlette.requests import ClientDisconnect
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from gossamer.api.workers import Workers
from gossamer.store.catalog.resolution import Download
from gossamer.store.spool import CHUNK


class FileReply(Response):
    """The reply; it leaves the context `opening` when it is done."""

    def __init__(
        self, opening: AbstractContextManager[Download], stored: Download, workers: Workers
    ) -> None:
        self.status_code = 200
        self.background = None
        self._nbytes = stored.version.nbytes
        # The name has only characters that a header may have in quotes.
        filename = f"{stored.version.name}.safetensors"
        self.init_headers(
            {
                "content-type": "application/octet-stream",
                "content-length": str(stored.version.nbytes),
                "content-disposition": f'attachment; filename="{filename}"',
                "etag": f'"{stored.version.blob_id}"',
                "x-gossamer-digest": stored.version.digest,
            }
        )
        self._opening = opening
        self._path = stored.path
        self._workers = workers

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
            await asyncio.shield(self._workers.file(self._opening.__exit__, None, None, None))


async def _disconnect(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
