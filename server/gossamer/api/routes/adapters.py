"""`/v1/adapters`: upload, list, show, download, roll back, delete."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Annotated, Any

from fastapi import APIRouter, Body, Query, Request
from starlette.requests import ClientDisconnect
from starlette.responses import Response

from gossamer.api.context import context_of
from gossamer.api.documented import errors
from gossamer.api.download import FileReply
from gossamer.api.errors import model_not_found
from gossamer.api.imports import is_foreign, upload_files
from gossamer.api.loaded_names import LoadedNames
from gossamer.api.model_string import parse_ref
from gossamer.api.schemas.adapters import (
    MOST_FILES,
    UPLOAD_BODY,
    AdapterDetails,
    AdapterList,
    DownloadQuery,
    RollbackRequest,
    TenantUsage,
    UploadedVersion,
    adapter_details,
    adapter_summary,
    uploaded_version,
)
from gossamer.api.schemas.replies import Deleted
from gossamer.api.services import Services, ServicesOf
from gossamer.api.spools import Spools
from gossamer.api.strict import StrictRoute
from gossamer.api.upload import Form, FormField, Received, read_boolean, receive_upload
from gossamer.store.catalog.names import Ref
from gossamer.store.catalog.views import VersionInfo
from gossamer.store.errors import AdapterFileError

router = APIRouter(tags=["adapters"], route_class=StrictRoute)

_FORM = Form(
    {"name": FormField(), "activate": FormField(read_boolean("activate"), default="true")},
    raw=True,
    most_files=MOST_FILES,
)


@router.post(
    "/v1/adapters",
    status_code=201,
    responses=errors(408, 409, 413, 422, 429, 507),
    openapi_extra=UPLOAD_BODY,
)
async def upload_adapter(request: Request, services: ServicesOf) -> UploadedVersion:
    """Upload an adapter as a new version of a name: a packed file, or the files of another library.

    A packed file is stored byte for byte. What says the same as the current or the newest version
    makes no new version.
    """
    tenant = context_of(request.scope).tenant
    limits, workers = services.settings.limits, services.workers
    with services.admission.upload(tenant):
        spools = Spools(services.catalog.spool)
        try:
            received = await receive_upload(request, _FORM, spools, workers, limits.form_fields)
            version = await _keep(request, received, spools, services)
        finally:
            await workers.file(spools.discard)
    names: LoadedNames = request.app.state.loaded_names
    names.remove(tenant, version.name)  # what is stored goes before it, and does not come back
    return uploaded_version(version, services.engine.resident())


async def _keep(
    request: Request, received: Received, spools: Spools, services: Services
) -> VersionInfo:
    """Store a packed file as it is; what is another library's is converted.

    Raises:
        ClientDisconnect: the client has gone before its turn came.
    """
    tenant, catalog, workers = context_of(request.scope).tenant, services.catalog, services.workers
    name, activate = received.values["name"], received.values["activate"]
    files = {filename or "": spools[i] for i, filename in enumerate(received.filenames)}
    if len(files) == 1:
        try:
            return await workers.file(catalog.upload, tenant, name, spools[0], activate=activate)
        except AdapterFileError as error:
            foreign = error.code == "unsupported_file" and await workers.file(is_foreign, files)
            if not foreign:
                raise
    limits = services.settings.limits.of_store().file

    async def begin() -> None:
        if await request.is_disconnected():
            raise ClientDisconnect

    return await workers.conversion(
        begin, upload_files, catalog, services.named, limits, tenant, name, files, activate=activate
    )


@router.get("/v1/adapters", responses=errors())
async def list_adapters(request: Request, services: ServicesOf) -> AdapterList:
    """All adapters of the tenant, with their versions."""
    tenant = context_of(request.scope).tenant
    adapters = await services.workers.query(services.catalog.list, tenant)
    usage = await services.workers.query(services.catalog.usage, tenant)
    limits, resident = services.settings.limits, services.engine.resident()
    return AdapterList(
        data=[adapter_summary(adapter, resident) for adapter in adapters],
        usage=TenantUsage(
            adapters=usage.adapters,
            max_adapters=limits.adapters_per_tenant,
            bytes=usage.stored_bytes,
            max_bytes=limits.adapter_bytes_per_tenant,
        ),
    )


@router.get(
    "/v1/adapters/{name:path}/content",
    responses=errors(404, 409, 422, 429, 507)
    | {200: {"content": {"application/octet-stream": {}}, "description": "The adapter file."}},
    response_class=Response,
)
async def download_adapter(
    name: str, request: Request, services: ServicesOf, query: Annotated[DownloadQuery, Query()]
) -> Response:
    """The stored file of a version (`sql`, `sql:3`, `sql@sha256:…`), byte for byte.

    With `increment`, a file of what the version adds to its parents.
    """
    tenant, ref, workers = context_of(request.scope).tenant, parse_ref(name), services.workers
    if query.increment:
        return await _increment(tenant, ref, services)
    opening = services.catalog.download(tenant, ref)
    stored = await workers.file(opening.__enter__)
    version = stored.version
    headers = {"etag": f'"{version.blob_id}"', "x-gossamer-digest": version.digest}
    filename = f"{version.name}.safetensors"
    return FileReply(opening, stored.path, version.nbytes, filename, headers, workers)


async def _increment(tenant: str, ref: Ref, services: Services) -> FileReply:
    """The file of what a version adds to its parents; its place is taken until it is sent."""
    workers = services.workers
    with ExitStack() as place:
        place.enter_context(services.admission.increment(tenant))
        making = services.catalog.increment(tenant, ref)
        made = await workers.increment(making.__enter__)
        headers = {"etag": f'"{made.blob_id}"', "x-gossamer-digest": made.digest}
        filename = f"{made.version.name}.increment.safetensors"
        return FileReply(
            making, made.path, made.nbytes, filename, headers, workers, place.pop_all().close
        )


@router.post("/v1/adapters/{name:path}/rollback", responses=errors(404, 408, 409, 413))
async def roll_back_adapter(
    name: str,
    request: Request,
    services: ServicesOf,
    body: Annotated[RollbackRequest | None, Body()] = None,
) -> UploadedVersion:
    """Make another version the current one: the one given, or the one before."""
    tenant, ref = _own(name, request)
    to = body.version if body is not None else None
    version = await services.workers.query(services.catalog.rollback, tenant, ref.name, to)
    return uploaded_version(version, services.engine.resident())


@router.get("/v1/adapters/{name:path}", responses=errors(404))
async def show_adapter(name: str, request: Request, services: ServicesOf) -> AdapterDetails:
    """An adapter with its versions and their modules."""
    tenant, ref = _own(name, request)
    adapter = await services.workers.query(services.catalog.show, tenant, ref.name)
    return adapter_details(adapter, services.engine.resident())


@router.delete("/v1/adapters/{name:path}", responses=errors(404, 409))
async def delete_adapter(name: str, request: Request, services: ServicesOf) -> Deleted:
    """Delete an adapter, or one version of it (`sql:3`)."""
    await delete(name, request, services)
    return Deleted(id=name, object="adapter")


async def delete(name: str, request: Request, services: Services) -> None:
    """Delete what `name` refers to.

    Raises:
        ApiError: 404
        CatalogError: 409 for the current version of several.
    """
    tenant, ref = _own(name, request, versions=True)
    which: int | str | None = ref.number if ref.number is not None else ref.tag
    await services.workers.query(services.catalog.delete, tenant, ref.name, which)


def _own(name: str, request: Request, *, versions: bool = False) -> tuple[str, Ref]:
    """The tenant, and the reference to an adapter of its own. Anybody else's is not there."""
    tenant = context_of(request.scope).tenant
    ref = parse_ref(name)
    foreign = ref.tenant is not None and ref.tenant != tenant
    version: Any = (ref.number, ref.tag) != (None, None)
    if foreign or ref.digest is not None or (version and not versions):
        raise model_not_found(name)
    return tenant, ref
