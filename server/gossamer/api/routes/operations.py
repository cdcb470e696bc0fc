"""Health, version and metrics: for whoever runs the server."""

from __future__ import annotations

import logging
from importlib.metadata import version

from fastapi import APIRouter
from starlette.responses import JSONResponse, Response

from gossamer.api.documented import errors
from gossamer.api.metrics import CONTENT_TYPE
from gossamer.api.schemas.replies import HealthReply, Version
from gossamer.api.services import ServicesOf
from gossamer.store.catalog.errors import CatalogError

logger = logging.getLogger(__name__)

router = APIRouter(tags=["operations"])


@router.get("/health/live")
async def live() -> HealthReply:
    """The process answers."""
    return HealthReply(status="ok")


@router.get("/health/ready", responses={503: {"model": HealthReply, "description": "Not ready."}})
async def ready(services: ServicesOf) -> Response:
    """Requests are served; otherwise 503 with the reason."""
    health = services.engine.health()
    reason = "The server is shutting down." if services.lifecycle.draining else health.reason
    status = 200 if reason is None else 503
    return JSONResponse(HealthReply(status=reason or "ok").model_dump(), status)


@router.get("/version", responses=errors())
async def show_version(services: ServicesOf) -> Version:
    """What runs here."""
    return Version(
        version=version("gossamer"),
        base=services.base.name,
        base_fingerprint=services.base.fingerprint,
    )


@router.get("/metrics", responses=errors(403), response_class=Response)
async def metrics(services: ServicesOf) -> Response:
    """Prometheus metrics; without a key from this machine, otherwise with an admin key."""
    try:
        services.metrics.jobs.tell(await services.workers.query(services.backlog.count))
    except CatalogError as error:  # the rest is worth most just then
        logger.warning("the jobs could not be counted: %s", error)
        services.metrics.jobs.tell(None)
    return Response(services.metrics.exposition(), 200, media_type=CONTENT_TYPE)
