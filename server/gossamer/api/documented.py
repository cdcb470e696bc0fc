"""What the routes say of their errors in /openapi.json."""

from __future__ import annotations

from typing import Any

from gossamer.api.schemas.replies import ErrorReply

_TEXTS = {
    400: "A field of the request is not acceptable; `param` names it.",
    401: "The API key is missing or not valid.",
    403: "The API key does not allow this.",
    404: "There is nothing of that name, or it is another tenant's.",
    408: "The body took too long to arrive.",
    409: "It contradicts the present state; `code` says how.",
    413: "The body, or what the tenant keeps, is too large.",
    422: "The adapter cannot be used with this base.",
    429: "Too much of this tenant is under way; `retry-after` says when to come again.",
    500: "The server had an error.",
    503: "The server cannot do it now; `retry-after` says when to come again.",
    507: "No space is left.",
}
#: what every route that wants a key may answer
_ALWAYS = (400, 401, 500, 503)


def errors(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """FastAPI's `responses` for these statuses and the ones that any route may answer."""
    return {
        status: {"model": ErrorReply, "description": _TEXTS[status]}
        for status in sorted({*_ALWAYS, *statuses})
    }
