"""The API's own errors, in the shape that OpenAI's clients read.

An `ApiError` carries all that its reply needs. The other rooms raise their own classes; the one
table that turns those into an `ApiError` is `gossamer.api.error_table`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

from starlette.exceptions import HTTPException
from starlette.responses import Response

#: The OpenAI client waits as told for at most two minutes and then gives up instead.
LONGEST_RETRY_AFTER = 60.0
NO_RETRY = {"x-should-retry": "false"}


class ApiError(HTTPException):
    """A reply that is not the one that was asked for.

    A subclass of HTTPException because FastAPI lets only that pass from the reading of a body.

    Attributes:
        status_code: of HTTP.
        message: what is wrong, for people.
        type: OpenAI's class of errors: `invalid_request_error`, `requests`, `tokens`,
            `insufficient_quota` or `server_error`.
        code: which error it is, for programs; or None.
        param: the field that is to blame, or None.
    """

    def __init__(
        self,
        status_code: int,
        message: str,
        *,
        type: str = "invalid_request_error",  # noqa: A002 - the field's name in the reply
        code: str | None = None,
        param: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(status_code, message, headers)
        self.message = message
        self.type = type
        self.code = code
        self.param = param

    def content(self) -> dict[str, Any]:
        """The JSON object of the reply."""
        return {
            "error": {
                "message": self.message,
                "type": self.type,
                "param": self.param,
                "code": self.code,
            }
        }

    def response(self) -> Response:
        """The reply. Its JSON is ASCII, so that no text of a client can break its encoding."""
        return Response(
            json.dumps(self.content()).encode("ascii"),
            self.status_code,
            self.headers,
            media_type="application/json",
        )


def invalid(param: str | None, message: str, *, code: str | None = None) -> ApiError:
    """400: a field of the request is not acceptable."""
    return ApiError(400, message, param=param, code=code)


def model_not_found(given: str, param: str = "model") -> ApiError:
    """404, the same for what is missing, deleted and another tenant's."""
    shown = given if len(given) <= 160 else given[:159] + "…"
    return ApiError(
        404,
        f"The model {shown!r} does not exist or you do not have access to it.",
        param=param,
        code="model_not_found",
    )


def invalid_api_key() -> ApiError:
    """401, the same whatever is wrong with the key."""
    return ApiError(
        401,
        "The API key is missing or not valid. Send it as `Authorization: Bearer <key>`.",
        code="invalid_api_key",
        headers={"www-authenticate": "Bearer"},
    )


def over_quota(message: str) -> ApiError:
    """429 that waiting alone does not cure: this tenant has as much as it may have."""
    return ApiError(
        429, message, type="insufficient_quota", code="insufficient_quota", headers={**NO_RETRY}
    )


def rate_limited(message: str, retry_after: float) -> ApiError:
    """429: this tenant has too much under way."""
    return ApiError(
        429,
        message,
        type="requests",
        code="rate_limit_exceeded",
        headers=retry_headers(retry_after),
    )


def unavailable(message: str, retry_after: float, *, code: str = "overloaded") -> ApiError:
    """503: the server cannot do it now, but may later."""
    return ApiError(
        503, message, type="server_error", code=code, headers=retry_headers(retry_after)
    )


def timed_out(message: str) -> ApiError:
    """503 that no retry will cure: the same request would take as long again."""
    return ApiError(503, message, type="server_error", code="request_timeout", headers={**NO_RETRY})


def internal() -> ApiError:
    """500, of which the client learns nothing; the log has the rest under the request's id."""
    return ApiError(
        500,
        "The server had an error while it processed the request.",
        type="server_error",
        code="internal_error",
    )


def retry_headers(seconds: float) -> dict[str, str]:
    """When to come again: `retry-after` in whole seconds and `retry-after-ms`."""
    seconds = min(max(seconds, 0.001), LONGEST_RETRY_AFTER)
    return {
        "retry-after": str(math.ceil(seconds)),
        "retry-after-ms": str(math.ceil(seconds * 1000)),
    }
