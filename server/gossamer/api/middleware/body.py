"""Bounds on the body: its bytes, the time it takes, and the gaps within it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from gossamer.api.context import header
from gossamer.api.errors import ApiError
from gossamer.api.settings import Limits

#: path of a POST that uploads a file → the limit of its bytes
UPLOADS: Mapping[str, Callable[[Limits], int]] = {
    "/v1/adapters": lambda limits: limits.adapter_bytes,
    "/v1/files": lambda limits: limits.training_file_bytes,
}
#: what goes around the file in a multipart form
_FORM_BYTES = 64 << 10


def too_large(limit: int) -> ApiError:
    """413: more bytes than the limit."""
    return ApiError(413, f"The body is larger than {limit} bytes.", code="request_too_large")


class BoundBody:
    """Count and time the body while the application reads it; nothing is buffered here."""

    def __init__(self, app: ASGIApp, limits: Limits) -> None:
        self._app = app
        self._limits = limits

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Refuse a body that is declared too large, and watch the others."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        limit, seconds = self._limits.json_bytes, self._limits.json_body_seconds
        if scope["method"] == "POST" and scope["path"] in UPLOADS:
            limit = UPLOADS[scope["path"]](self._limits) + _FORM_BYTES
            seconds = self._limits.upload_seconds
        declared = header(scope, b"content-length")
        if declared is not None and declared.isdigit() and int(declared) > limit:
            await too_large(limit).response()(scope, receive, send)
            return
        body = _Body(receive, limit, seconds, self._limits.body_gap_seconds)
        await self._app(scope, body.receive, send)


class _Body:
    """The receiving side of one request."""

    def __init__(self, receive: Receive, limit: int, seconds: float, gap: float) -> None:
        self._receive = receive
        self._limit = limit
        self._gap = gap
        self._deadline = asyncio.get_running_loop().time() + seconds
        self._left = limit
        self._complete = False

    async def receive(self) -> Message:
        """As ASGI's receive. Once the body is complete there are no bounds: what comes then is the
        news that the client has gone.

        Raises:
            ApiError: 413 or 408.
        """
        if self._complete:
            return await self._receive()
        now = asyncio.get_running_loop().time()
        try:
            async with asyncio.timeout_at(min(self._deadline, now + self._gap)):
                message = await self._receive()
        except TimeoutError:
            raise ApiError(408, "The body took too long to arrive.", code="slow_body") from None
        if message["type"] == "http.request":
            self._left -= len(message.get("body", b""))
            if self._left < 0:
                raise too_large(self._limit)
            self._complete = not message.get("more_body", False)
        return message
