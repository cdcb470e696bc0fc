"""Whose request it is. Every path wants a key, those without a route too; only health does not."""

from __future__ import annotations

from functools import partial

import anyio
from starlette.types import ASGIApp, Receive, Scope, Send

from gossamer.api.context import context_of, header
from gossamer.api.error_table import to_api_error
from gossamer.api.errors import ApiError
from gossamer.store.catalog.errors import CatalogError
from gossamer.store.keys import KeyRing

OPEN_PATHS = frozenset({"/health/live", "/health/ready"})
METRICS_PATH = "/metrics"
_LOOPBACK = ("127.", "::1")
#: A proxy on this machine connects over loopback too; these tell that it speaks for another.
_PROXIED = frozenset({b"forwarded", b"x-forwarded-for", b"x-real-ip", b"via"})
#: Verifying is one short query; more threads would only wait for the interpreter's lock.
_THREADS = 4


class Authenticate:
    """Put the key's principal into the request's context, or answer 401.

    A missing, malformed, unknown, wrong, expired or revoked key gets the same answer by the same
    way: all of them are looked up.
    """

    def __init__(self, app: ASGIApp, keys: KeyRing) -> None:
        self._app = app
        self._keys = keys
        self._threads = anyio.CapacityLimiter(_THREADS)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Let the request in or answer it."""
        if scope["type"] == "http" and not _is_open(scope):
            try:
                await self._admit(scope)
            except (CatalogError, ApiError) as error:
                await to_api_error(error).response()(scope, receive, send)
                return
        await self._app(scope, receive, send)

    async def _admit(self, scope: Scope) -> None:
        verify = partial(self._keys.verify, bearer(scope))
        principal = await anyio.to_thread.run_sync(verify, limiter=self._threads)
        context_of(scope).principal = principal
        if scope["path"] == METRICS_PATH and principal.scope != "admin":
            raise ApiError(403, "Metrics are for admin keys.", code="forbidden")


def bearer(scope: Scope) -> str:
    """The text of the bearer token; the empty text when there is none or more than one."""
    kind, _, token = (header(scope, b"authorization") or b"").decode("latin-1").partition(" ")
    return token.strip() if kind.lower() == "bearer" else ""


def _is_open(scope: Scope) -> bool:
    if scope["path"] in OPEN_PATHS:
        return True
    if scope["path"] != METRICS_PATH:
        return False
    client = scope.get("client")
    local = client is not None and client[0].startswith(_LOOPBACK)
    return local and not any(name in _PROXIED for name, _ in scope["headers"])
