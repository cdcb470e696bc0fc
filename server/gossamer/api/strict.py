"""Strict JSON: FastAPI's own reading of a body takes NaN, and half of a surrogate pair."""

from __future__ import annotations

import json
from collections.abc import Callable, Coroutine
from typing import Any

from fastapi.routing import APIRoute
from pydantic_core import from_json
from starlette.requests import Request
from starlette.responses import Response


class StrictRequest(Request):
    """A request whose `json` refuses NaN, Infinity, invalid UTF-8, lone surrogates, and arrays and
    objects nested deeper than 200."""

    async def json(self) -> Any:
        """The body, parsed.

        Raises:
            JSONDecodeError: FastAPI answers it as a validation error.
        """
        try:
            return from_json(await self.body(), allow_inf_nan=False)
        except ValueError as error:
            raise json.JSONDecodeError(str(error), "", 0) from error


class StrictRoute(APIRoute):
    """A route that reads its body as `StrictRequest` does."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """FastAPI's handler, given a strict request."""
        handle = super().get_route_handler()

        async def strict(request: Request) -> Response:
            return await handle(StrictRequest(request.scope, request.receive))

        return strict
