"""An id for every request, a log line at its end, and an answer whatever happens."""

from __future__ import annotations

import logging
import time
from typing import Any

from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from gossamer.api.context import RequestContext, open_context
from gossamer.api.errors import internal
from gossamer.api.metrics import Metrics

logger = logging.getLogger("gossamer.access")
#: what nginx logs for a client that went away before its answer
CLIENT_CLOSED_REQUEST = 499


class Identify:
    """The outermost layer: whatever escapes the others ends here, as a 500 without details."""

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        self._app = app
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Run the request; add `x-request-id` to its answer."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        context = open_context(scope)
        identity = (b"x-request-id", context.id.encode("ascii"))
        status = 0

        async def send_identified(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message.get("headers", ()), identity]
            await send(message)

        try:
            await self._app(scope, receive, send_identified)
        except ClientDisconnect:
            self._metrics.cancelled.inc()
        except Exception:
            logger.exception("a request failed", extra={"request_id": context.id})
            if status:  # the answer has begun: only the closed connection can tell of the failure
                raise
            await internal().response()(scope, receive, send_identified)
        finally:
            self._record(scope, context, status or CLIENT_CLOSED_REQUEST)

    def _record(self, scope: Scope, context: RequestContext, status: int) -> None:
        seconds = time.monotonic() - context.started
        # The template of the route, never the path: paths are of the clients' making.
        route = getattr(scope.get("route"), "path", "other")
        self._metrics.answered(route, scope["method"], status, seconds)
        entry: dict[str, Any] = {
            "request_id": context.id,
            "method": scope["method"],
            "route": route,
            "status": status,
            "ms": round(seconds * 1000, 1),
        }
        if context.principal is not None:
            entry |= {"tenant": context.principal.tenant, "key_id": context.principal.key_id}
        level = logging.DEBUG if route.startswith("/health") else logging.INFO
        logger.log(level, "request", extra=entry | context.notes)
