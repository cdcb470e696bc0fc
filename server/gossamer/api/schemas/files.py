"""`/v1/files`."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, Field

from gossamer.api.schemas.pages import Cursor, ListReply, Order, QueryModel
from gossamer.store.catalog.views import FileInfo

#: OpenAPI of the upload: FastAPI cannot tell, because the body is read as it comes.
UPLOAD_BODY: dict[str, Any] = {
    "requestBody": {
        "required": True,
        "content": {
            "multipart/form-data": {
                "schema": {
                    "type": "object",
                    "required": ["purpose", "file"],
                    "additionalProperties": False,
                    "properties": {
                        "purpose": {"type": "string", "enum": ["fine-tune"]},
                        "file": {"type": "string", "format": "binary"},
                    },
                }
            }
        },
    },
}


class FilesQuery(QueryModel):
    """Which files to list."""

    purpose: str | None = None
    after: Cursor | None = None
    limit: Annotated[int, Field(ge=1, le=10_000)] = 10_000
    order: Order = "desc"


class FileObject(BaseModel):
    """A file, in OpenAI's shape. What it says is checked by the job that trains on it."""

    id: str
    object: Literal["file"] = "file"
    bytes: int
    created_at: int
    filename: str
    purpose: Literal["fine-tune", "fine-tune-results"]
    status: Literal["processed"] = "processed"
    expires_at: None = None
    status_details: None = None


class FileList(ListReply):
    """The tenant's files."""

    data: list[FileObject]


def file_object(file: FileInfo) -> FileObject:
    """The store's value as a reply."""
    return FileObject(
        id=file.id,
        bytes=file.nbytes,
        created_at=int(file.created_at.timestamp()),
        filename=file.filename,
        purpose=file.purpose,
    )
