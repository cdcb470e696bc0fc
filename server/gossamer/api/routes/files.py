"""`/v1/files`: the data that jobs train on, and the results that they report."""

from __future__ import annotations

from typing import Annotated, get_args

from fastapi import APIRouter, Query, Request
from starlette.responses import Response

from gossamer.api.context import context_of
from gossamer.api.documented import errors
from gossamer.api.download import FileReply
from gossamer.api.errors import invalid
from gossamer.api.schemas.files import UPLOAD_BODY, FileList, FileObject, FilesQuery, file_object
from gossamer.api.schemas.pages import page_of
from gossamer.api.schemas.replies import Deleted
from gossamer.api.services import ServicesOf
from gossamer.api.spools import Spools
from gossamer.api.upload import Form, FormField, receive_upload
from gossamer.store.catalog.errors import FileNotFound
from gossamer.store.catalog.views import Purpose

router = APIRouter(tags=["files"])

_PURPOSE: Purpose = "fine-tune"
#: what httpx calls a file that its caller gave no name
_NAMELESS = "upload"


def _read_purpose(text: str) -> Purpose:
    if text != _PURPOSE:
        raise invalid("purpose", f"Files are for training here: purpose is `{_PURPOSE}`.")
    return _PURPOSE


_FORM = Form(
    {"purpose": FormField(_read_purpose)},
    refused={"expires_after": "Files do not expire here; delete them when they are not needed."},
)


@router.post("/v1/files", responses=errors(408, 409, 413, 429, 507), openapi_extra=UPLOAD_BODY)
async def upload_file(request: Request, services: ServicesOf) -> FileObject:
    """Upload a file to train on: JSON lines, checked by the job that uses them."""
    tenant = context_of(request.scope).tenant
    limits, workers = services.settings.limits, services.workers
    with services.admission.upload(tenant):
        spools = Spools(services.files.spool)
        try:
            received = await receive_upload(request, _FORM, spools, workers, limits.form_fields)
            if not spools[0].size:
                raise invalid("file", "The file is empty.")
            name = received.filenames[0] or _NAMELESS
            file = await workers.file(
                services.files.upload, tenant, name, received.values["purpose"], spools[0]
            )
        finally:
            await workers.file(spools.discard)
    return file_object(file)


@router.get("/v1/files", responses=errors())
async def list_files(
    request: Request, services: ServicesOf, query: Annotated[FilesQuery, Query()]
) -> FileList:
    """The tenant's files, the newest first unless `order` is `asc`."""
    tenant = context_of(request.scope).tenant
    purpose = next((known for known in get_args(Purpose) if known == query.purpose), None)
    if query.purpose is not None and purpose is None:  # OpenAI has more purposes; no file has them
        return FileList(**page_of([], has_more=False))
    try:
        page = await services.workers.query(
            services.files.list,
            tenant,
            purpose=purpose,
            after=query.after,
            limit=query.limit,
            order=query.order,
        )
    except FileNotFound as error:
        raise invalid("after", str(error)) from error
    return FileList(**page_of([file_object(file) for file in page.items], has_more=page.has_more))


@router.get("/v1/files/{file_id}", responses=errors(404))
async def show_file(file_id: str, request: Request, services: ServicesOf) -> FileObject:
    """One file."""
    tenant = context_of(request.scope).tenant
    return file_object(await services.workers.query(services.files.get, tenant, file_id))


@router.get(
    "/v1/files/{file_id}/content",
    responses=errors(404, 409)
    | {200: {"content": {"application/octet-stream": {}}, "description": "The file."}},
    response_class=Response,
)
async def download_file(file_id: str, request: Request, services: ServicesOf) -> Response:
    """The bytes of a file, as they were uploaded."""
    tenant, workers = context_of(request.scope).tenant, services.workers
    file = await workers.query(services.files.get, tenant, file_id)
    opening = services.files.content(tenant, file_id)
    path = await workers.file(opening.__enter__)
    headers = {"etag": f'"{file.blob_id}"'}
    return FileReply(opening, path, file.nbytes, file.filename, headers, workers)


@router.delete("/v1/files/{file_id}", responses=errors(404, 507))
async def delete_file(file_id: str, request: Request, services: ServicesOf) -> Deleted:
    """Delete a file. An unfinished job that uses it may still read it."""
    tenant = context_of(request.scope).tenant
    await services.workers.query(services.files.delete, tenant, file_id)
    return Deleted(id=file_id, object="file")
