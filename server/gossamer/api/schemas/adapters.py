"""`/v1/adapters`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, Field

from gossamer.api.schemas.common import RequestModel
from gossamer.api.schemas.pages import QueryModel
from gossamer.store.catalog.views import AdapterInfo, VersionInfo

_FIELDS = {
    "name": {"type": "string", "description": "`[a-z0-9][a-z0-9._-]*`"},
    "activate": {
        "type": "string",
        "enum": ["true", "false"],
        "description": "Whether the bare name means this version from now on (default true).",
    },
}
#: of one upload; no format has more
MOST_FILES = 8
_FILE = {"type": "string", "format": "binary", "description": "A packed adapter."}
_FILES = {
    "type": "array",
    "minItems": 1,
    "maxItems": MOST_FILES,
    "items": {"type": "string", "format": "binary"},
    "description": "The files of an adapter of another library, each with its filename.",
}
#: OpenAPI of the upload: FastAPI cannot tell, because the body is read as it comes.
UPLOAD_BODY: dict[str, Any] = {
    "parameters": [
        {"name": name, "in": "query", "required": False, "schema": schema}
        for name, schema in _FIELDS.items()
    ],
    "requestBody": {
        "required": True,
        "content": {
            "multipart/form-data": {
                "schema": {
                    "type": "object",
                    "required": ["name"],
                    "anyOf": [{"required": ["file"]}, {"required": ["files"]}],
                    "additionalProperties": False,
                    "properties": _FIELDS | {"file": _FILE, "files": _FILES},
                }
            },
            "application/octet-stream": {"schema": {"type": "string", "format": "binary"}},
        },
    },
}


class RollbackRequest(RequestModel):
    """Which version becomes the current one; the one before, when it is left out."""

    version: Annotated[int, Field(ge=1, lt=2**31)] | None = None


class DownloadQuery(QueryModel):
    """What of a version to send."""

    increment: bool = Field(
        default=False,
        description="Only what the version adds to the parents that it was trained beside, as a "
        "file of its own; they must be among the tenant's adapters.",
    )


class AdapterModule(BaseModel):
    """What a version changes in one weight of the base."""

    name: str
    kind: Literal["element", "block"]
    shape: list[int]
    block_size: int
    value_dtype: str
    nnz: int
    density: float


class VersionSummary(BaseModel):
    """One version. `id` always means it; `bytes` are of the stored file, `resident_bytes` of its
    copy in memory (0 when it is not there). A training job's checkpoint has a `tag`, no number."""

    id: str
    version: int | None
    tag: str | None
    digest: str
    bytes: int
    resident_bytes: int
    nnz: int
    density: float
    value_dtypes: list[str]
    base_verified: bool
    status: str
    current: bool
    created_at: int
    warnings: list[str]


class VersionDetails(VersionSummary):
    """One version with its modules and how it was trained."""

    modules: list[AdapterModule]
    record: dict[str, Any]


class UploadedVersion(VersionDetails):
    """A version that was uploaded, or made current."""

    object: Literal["adapter.version"] = "adapter.version"
    name: str


class Adapter(BaseModel):
    """An adapter; `current` is the version that its bare name means."""

    object: Literal["adapter"] = "adapter"
    id: str
    current: int | None
    created_at: int


class AdapterSummary(Adapter):
    """An adapter in a list."""

    versions: list[VersionSummary]


class AdapterDetails(Adapter):
    """An adapter by itself."""

    versions: list[VersionDetails]


class TenantUsage(BaseModel):
    """What the tenant keeps, and how much it may keep."""

    adapters: int
    max_adapters: int
    bytes: int
    max_bytes: int


class AdapterList(BaseModel):
    """The tenant's adapters by name."""

    object: Literal["list"] = "list"
    data: list[AdapterSummary]
    usage: TenantUsage


Resident = Mapping[str, int]


def adapter_summary(adapter: AdapterInfo, resident: Resident) -> AdapterSummary:
    """The catalog's value as a reply. `resident` is digest → bytes in memory."""
    versions = [VersionSummary(**_summary(version, resident)) for version in adapter.versions]
    return AdapterSummary(**_adapter(adapter), versions=versions)


def adapter_details(adapter: AdapterInfo, resident: Resident) -> AdapterDetails:
    """The catalog's value as a reply."""
    versions = [VersionDetails(**_details(version, resident)) for version in adapter.versions]
    return AdapterDetails(**_adapter(adapter), versions=versions)


def uploaded_version(version: VersionInfo, resident: Resident) -> UploadedVersion:
    """The catalog's value as a reply."""
    return UploadedVersion(**_details(version, resident), name=version.name)


def _adapter(adapter: AdapterInfo) -> dict[str, Any]:
    return {
        "id": adapter.name,
        "current": adapter.current,
        "created_at": int(adapter.created_at.timestamp()),
    }


def _summary(version: VersionInfo, resident: Resident) -> dict[str, Any]:
    return {
        "id": version.label,
        "version": version.number,
        "tag": version.tag,
        "digest": version.digest,
        "bytes": version.nbytes,
        "resident_bytes": resident.get(version.digest, 0),
        "nnz": version.nnz,
        "density": version.density,
        "value_dtypes": sorted({module.value_dtype for module in version.modules}),
        "base_verified": version.base_verified,
        "status": version.status,
        "current": version.current,
        "created_at": int(version.created_at.timestamp()),
        "warnings": list(version.warnings),
    }


def _details(version: VersionInfo, resident: Resident) -> dict[str, Any]:
    modules = [
        AdapterModule(
            name=module.name,
            kind=module.kind,
            shape=list(module.shape),
            block_size=module.block_size,
            value_dtype=module.value_dtype,
            nnz=module.nnz,
            density=module.density,
        )
        for module in version.modules
    ]
    return _summary(version, resident) | {"modules": modules, "record": dict(version.record)}
