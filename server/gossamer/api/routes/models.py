"""`/v1/models`: the base and the tenant's adapters, as OpenAI's clients list them; and the names
that vLLM's clients loaded."""

from __future__ import annotations

from fastapi import APIRouter, Request

from gossamer.api.context import context_of
from gossamer.api.documented import errors
from gossamer.api.errors import invalid
from gossamer.api.loaded_names import LoadedNames, find_adapter
from gossamer.api.routes.adapters import delete
from gossamer.api.schemas.replies import Deleted, ModelList, ModelObject
from gossamer.api.services import Services, ServicesOf
from gossamer.store.catalog.errors import AdapterNotFound, WrongBase
from gossamer.store.catalog.names import BASE
from gossamer.store.catalog.views import AdapterInfo

router = APIRouter(tags=["models"])


@router.get("/v1/models", responses=errors())
async def list_models(request: Request, services: ServicesOf) -> ModelList:
    """The base, then every adapter that has a current version, then the names that are loaded."""
    tenant = context_of(request.scope).tenant
    names: LoadedNames = request.app.state.loaded_names
    adapters = await services.workers.query(services.catalog.list, tenant)
    mine = [_adapter(services, a, a.name) for a in adapters if a.current is not None]
    loaded = []
    for name in names.of(tenant):
        try:
            adapter, reference = await find_adapter(services, names, tenant, name)
        except (AdapterNotFound, WrongBase):
            continue  # what it stood for is gone
        if reference is not None:
            loaded.append(_adapter(services, adapter, name, reference))
    return ModelList(data=[_base(services), *mine, *loaded])


@router.get("/v1/models/{model:path}", responses=errors(404, 409, 422))
async def show_model(model: str, request: Request, services: ServicesOf) -> ModelObject:
    """The base, an adapter, one version of it (`sql:3`, `sql@sha256:…`), or a loaded name."""
    if model in services.mixes.base_names:
        return _base(services)
    tenant = context_of(request.scope).tenant
    names: LoadedNames = request.app.state.loaded_names
    adapter, reference = await find_adapter(services, names, tenant, model)
    return _adapter(services, adapter, model, reference)


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


def _adapter(
    services: Services, adapter: AdapterInfo, name: str, reference: str | None = None
) -> ModelObject:
    return ModelObject(
        id=name,
        created=int(adapter.created_at.timestamp()),
        owned_by=adapter.tenant,
        root=services.base.name if reference is None else reference,
        parent=BASE,
        max_model_len=services.engine.context_length,
    )
