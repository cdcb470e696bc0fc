"""What the outer layers know of a request, for the routes and for the log line at its end."""

from __future__ import annotations

import re
import secrets
import time
from dataclasses import dataclass, field
from typing import Any

from starlette.types import Scope

from gossamer.store.keys import Principal

_KEY = "gossamer"
_SANE_ID = re.compile(rb"[A-Za-z0-9._:\-]{1,128}")


@dataclass(eq=False)
class RequestContext:
    """One HTTP request on its way through the server.

    Attributes:
        id: its `x-request-id`.
        started: of `time.monotonic`.
        principal: whose key it carries, once that is known.
        notes: what the log line at its end tells beside the usual.
    """

    id: str
    started: float = field(default_factory=time.monotonic)
    principal: Principal | None = None
    notes: dict[str, Any] = field(default_factory=dict)

    @property
    def tenant(self) -> str:
        """The tenant of a request that has passed authentication."""
        if self.principal is None:
            raise RuntimeError("this route lets requests in without a key")
        return self.principal.tenant


def open_context(scope: Scope) -> RequestContext:
    """The context of a request that has just come in."""
    given = header(scope, b"x-request-id")
    if given is not None and _SANE_ID.fullmatch(given):
        context = RequestContext(given.decode("ascii"))
    else:
        context = RequestContext(f"req_{secrets.token_hex(12)}")
    scope[_KEY] = context
    return context


def context_of(scope: Scope) -> RequestContext:
    """The context that `open_context` made."""
    context: RequestContext = scope[_KEY]
    return context


def header(scope: Scope, name: bytes) -> bytes | None:
    """The value of a header (its name in lower case), or None when it is not given just once."""
    values = [value for key, value in scope["headers"] if key == name]
    return values[0] if len(values) == 1 else None
