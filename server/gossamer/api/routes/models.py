"""`/v1/models`: the base and the tenant's adapters, as OpenAI's clients list them."""

from __future__ import annotations

from fastapi import APIRouter, Request

from gossamer.api.context import context_of
from gossamer.api.documented import errors
from gossamer.api.errors import invalid
from gossamer.api.model_string import parse_ref
from gossamer.api.routes.adapters import delete
from gossamer.api.schemas.replies import Deleted, ModelList, ModelObject
from gossamer.api.services import Services, ServicesOf
from gossamer.store.catalog.names import BASE
from gossamer.store.catalog.views import AdapterInfo

router = APIRouter(tags=["models"])


@router.get("/v1/models", responses=errors())
async def list_models(request: Request, services: ServicesOf) -> ModelList:
    """The base, then every adapter that has a current version."""
    tenant = context_of(request.scope).tenant
    adapters = await services.workers.query(services.catalog.list, tenant)
    mine = [_adapter(services, a, a.name) for a in adapters if a.current is not None]
    return ModelList(data=[_base(services), *mine])


@router.get("/v1/models/{model:path}", responses=errors(404, 409, 422))
async def show_model(model: str, request: Request, services: ServicesOf) -> ModelObject:
    """The base, an adapter, or one version of it (`sql:3`, `sql@sha256:…`)."""
    if model in services.mixes.base_names:
        return _base(services)
    tenant, ref = context_of(request.scope).tenant, parse_ref(model)
    with await services.workers.query(services.catalog.resolve, tenant, [ref]):
        adapter = await services.workers.query(services.catalog.show, tenant, ref.name)
    return _adapter(services, adapter, model)


@router.delete("/v1/models/{model:path}", responses=errors(404, 409))
async def delete_model(model: str, request: Request, services: ServicesOf) -> Deleted:
    """Delete an adapter, or one version of it."""
    if model in services.mixes.base_names:
        raise invalid("model", "The base model cannot be deleted.")
    await delete(model, request, services)
    return Deleted(id=model, object="model")


def _base(services: Services) -> ModelObject:
    return ModelObject(
        id=BASE,
        created=services.started,
        owned_by="gossamer",
        root=services.base.name,
        max_model_len=services.engine.context_length,
    )


def _adapter(services: Services, adapter: AdapterInfo, name: str) -> ModelObject:
    return ModelObject(
        id=name,
        created=int(adapter.created_at.timestamp()),
        owned_by=adapter.tenant,
        root=services.base.name,
        parent=BASE,
        max_model_len=services.engine.context_length,
    )
