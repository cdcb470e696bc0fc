"""While the server drains, it answers new requests with a 503 that says when to come again."""

from __future__ import annotations

from starlette.types import ASGIApp, Receive, Scope, Send

from gossamer.api.errors import unavailable
from gossamer.api.lifecycle import Lifecycle
from gossamer.api.middleware.authenticate import OPEN_PATHS


class Gate:
    """Closed from the beginning of the drain; the health routes stay open."""

    def __init__(self, app: ASGIApp, lifecycle: Lifecycle) -> None:
        self._app = app
        self._lifecycle = lifecycle

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Refuse the request or pass it on."""
        closed = scope["type"] == "http" and self._lifecycle.draining
        if closed and scope["path"] not in OPEN_PATHS:
            refusal = unavailable(
                "The server is shutting down; another one may be up already.",
                retry_after=1.0,
                code="shutting_down",
            )
            await refusal.response()(scope, receive, send)
            return
        await self._app(scope, receive, send)
