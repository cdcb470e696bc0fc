"""The application: routes, the layers around them, errors, start and end."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import replace
from importlib.metadata import version
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.openapi.utils import get_openapi
from starlette.exceptions import HTTPException
from starlette.responses import Response

from gossamer.api.context import context_of
from gossamer.api.documented import document_streams
from gossamer.api.error_table import HANDLED, field_errors, to_api_error
from gossamer.api.errors import ApiError
from gossamer.api.loaded_names import LoadedNames, NamedMixes
from gossamer.api.middleware.authenticate import OPEN_PATHS, Authenticate
from gossamer.api.middleware.body import BoundBody
from gossamer.api.middleware.gate import Gate
from gossamer.api.middleware.identify import Identify
from gossamer.api.routes import (
    adapters,
    chat,
    compatibility,
    completions,
    files,
    fine_tuning,
    models,
    operations,
    tokenize,
)
from gossamer.api.services import Services
from gossamer.engine.errors import EngineError
from gossamer.store.catalog.errors import CatalogError

logger = logging.getLogger(__name__)


def create_app(services: Services) -> FastAPI:
    """The ASGI application over `services`.

    Its lifespan starts the engine and stops it with everything else in `services`, which therefore
    serve one lifespan only. After the start `app.state.first_key` is the first admin key if this
    start made it, else None.
    """
    app = FastAPI(
        title="gossamer",
        version=version("gossamer"),
        lifespan=_lifespan,
        # They load scripts from a content delivery network.
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,
    )
    names = LoadedNames(services.settings.limits.adapters_per_tenant)
    app.state.loaded_names = names
    app.state.services = replace(services, mixes=NamedMixes(services, names))
    app.state.first_key = None
    routes = (completions, chat, models, adapters, files, fine_tuning, tokenize, compatibility)
    for module in (*routes, operations):
        app.include_router(module.router)
    # The last one added is the outermost.
    app.add_middleware(BoundBody, limits=services.settings.limits)
    app.add_middleware(Authenticate, keys=services.store.keys)
    app.add_middleware(Gate, lifecycle=services.lifecycle)
    app.add_middleware(Identify, metrics=services.metrics)
    for error in HANDLED:
        app.add_exception_handler(error, _answer_error)
    app.add_exception_handler(RequestValidationError, _answer_invalid)
    app.add_exception_handler(HTTPException, _answer_http)
    app.openapi = _openapi_of(app)  # type: ignore[method-assign]
    return app


@asynccontextmanager
async def _lifespan(app: FastAPI) -> AsyncIterator[None]:
    services: Services = app.state.services
    async with AsyncExitStack() as started:
        started.push_async_callback(asyncio.to_thread, services.store.close)
        tenant, keys = services.settings.first_tenant, services.store.keys
        app.state.first_key = await asyncio.to_thread(keys.ensure_first_admin, tenant)
        started.push_async_callback(asyncio.to_thread, services.constraints.close)
        services.postbox.open()
        started.callback(services.postbox.close)
        services.engine.start()
        started.push_async_callback(asyncio.to_thread, services.engine.close)
        ending = asyncio.Event()
        async with asyncio.TaskGroup() as background:
            background.create_task(_warm_up(services))
            background.create_task(_collect(services, ending))
            try:
                yield
            finally:
                ending.set()


async def _warm_up(services: Services) -> None:
    try:
        await asyncio.to_thread(services.constraints.warm_up)
    except EngineError as error:  # requests for structured output will be told the same
        logger.warning("structured output is not available: %s", error)


async def _collect(services: Services, ending: asyncio.Event) -> None:
    """Now and then, unlink what other processes have let go of: only the server may."""
    while not ending.is_set():
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(ending.wait(), services.settings.collect_seconds)
            return
        try:
            found = await asyncio.to_thread(services.catalog.recover)
        except CatalogError as error:  # the next time, then
            logger.warning("nothing was collected: %s", error)
        else:
            logger.debug("collected %d blobs", found.blobs)


async def _answer_error(request: Request, error: Exception) -> Response:
    answer = to_api_error(error)
    if answer.status_code >= 500:
        extra = {"request_id": context_of(request.scope).id}
        logger.error("a request failed: %s", error, exc_info=error, extra=extra)
    return answer.response()


async def _answer_invalid(_request: Request, error: Exception) -> Response:
    if not isinstance(error, RequestValidationError):
        raise error
    return field_errors(error.errors()).response()


async def _answer_http(_request: Request, error: Exception) -> Response:
    """What starlette itself refuses: no such route, no such method."""
    if not isinstance(error, HTTPException):
        raise error
    status = error.status_code
    message = {404: "There is no such route.", 405: "The route does not have this method."}
    detail = message.get(status, error.detail)
    return ApiError(status, detail, code="unknown_route", headers=error.headers).response()


def _openapi_of(app: FastAPI) -> Callable[[], dict[str, Any]]:
    """FastAPI's description, with the key that all routes but health want."""

    def openapi() -> dict[str, Any]:
        if app.openapi_schema is None:
            schema = get_openapi(title=app.title, version=app.version, routes=app.routes)
            schemes = schema.setdefault("components", {}).setdefault("securitySchemes", {})
            schemes["key"] = {"type": "http", "scheme": "bearer"}
            for path, operations_ in schema["paths"].items():
                for operation in operations_.values():
                    # FastAPI documents its own answer to invalid requests, which is not ours.
                    answers = operation["responses"]
                    if "HTTPValidationError" in str(answers.get("422")):
                        del answers["422"]
                    if path not in OPEN_PATHS:
                        operation["security"] = [{"key": []}]
            document_streams(schema)
            for name in ("HTTPValidationError", "ValidationError"):
                schema["components"].get("schemas", {}).pop(name, None)
            app.openapi_schema = schema
        return app.openapi_schema

    return openapi
