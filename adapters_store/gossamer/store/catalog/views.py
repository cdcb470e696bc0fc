"""What the catalog takes and answers: small frozen values, safe to keep and to pass on."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Generic, Literal, TypeVar

from gossamer.store.format import DEFAULT_LIMITS, ServingDtype
from gossamer.store.format import Limits as FileLimits

Status = Literal["active", "tombstoned", "corrupt"]
#: what a file is for: training data that a tenant sent, or what a job reports of its run
Purpose = Literal["fine-tune", "fine-tune-results"]
Direction = Literal["asc", "desc"]

Item = TypeVar("Item")


@dataclass(frozen=True)
class BaseInfo:
    """The base model that adapters are checked against.

    Attributes:
        name: shown to users, and no adapter's name.
        fingerprint: of the loaded parameters.
        table: weight name in the base's own naming → (out_features, in_features).
        serving_dtype: what the server runs in; every difference must be finite in it.
    """

    name: str
    fingerprint: str
    table: Mapping[str, tuple[int, int]]
    serving_dtype: ServingDtype = "float32"


@dataclass(frozen=True)
class StoreLimits:
    """What one tenant may keep, and how patient collection is.

    Attributes:
        adapters: adapters a tenant may have; one with checkpoints only does not count.
        stored_bytes: bytes a tenant's versions and checkpoints may take, equal files counted once.
        file: caps of one adapter file's validation.
        files: training files a tenant may have; a job's result files do not count.
        file_bytes: bytes that these may take, equal files counted once.
        training_file_bytes: cap of one training file.
        grace_s: age in seconds after which an upload in progress counts as abandoned, and a blob
            that the registry does not know as garbage.
    """

    adapters: int = 100
    stored_bytes: int = 4 << 30
    file: FileLimits = DEFAULT_LIMITS
    files: int = 100
    file_bytes: int = 1 << 30
    training_file_bytes: int = 256 << 20
    grace_s: float = 3600.0


@dataclass(frozen=True)
class ModuleInfo:
    """What a version changes in one base weight. `density` is nnz over the weight's elements."""

    name: str
    kind: Literal["element", "block"]
    shape: tuple[int, int]
    block_size: int
    value_dtype: str
    nnz: int
    density: float


@dataclass(frozen=True)
class VersionInfo:
    """One version. A checkpoint has a `tag` and no number; every other has a number and no tag.

    Attributes:
        digest: `sha256:<64 hex>`, what the version says; its identity everywhere.
        blob_id: sha256 of the stored bytes, 64 hex digits.
        nbytes: size of the stored file in bytes.
        nnz: stored entries over all modules.
        density: nnz over the elements of the weights it touches.
        record: how it was trained, as the file tells it.
        base_verified: False for a file without a fingerprint, checked by names and shapes only.
        current: whether the bare name means this version.
    """

    tenant: str
    name: str
    number: int | None
    tag: str | None
    digest: str
    blob_id: str
    nbytes: int
    nnz: int
    density: float
    modules: tuple[ModuleInfo, ...]
    record: Mapping[str, Any]
    warnings: tuple[str, ...]
    base_fingerprint: str
    base_verified: bool
    status: Status
    created_at: datetime
    current: bool

    @property
    def label(self) -> str:
        """`sql:3` or `sql@step-40`: a reference that always means this version."""
        return f"{self.name}:{self.number}" if self.tag is None else f"{self.name}@{self.tag}"


@dataclass(frozen=True)
class AdapterInfo:
    """One adapter and its versions, oldest first; deleted ones are not among them.

    `current` is the number of the version that the bare name means; None when there are only
    checkpoints or inactive uploads.
    """

    tenant: str
    name: str
    current: int | None
    created_at: datetime
    versions: tuple[VersionInfo, ...]


@dataclass(frozen=True)
class Usage:
    """What a tenant's quota counts (see `StoreLimits`)."""

    adapters: int
    stored_bytes: int


@dataclass(frozen=True)
class FileInfo:
    """One file that a tenant keeps beside its adapters.

    Attributes:
        id: `file-<24 hex digits>`, drawn at random.
        filename: as the client called it; shown, and never a path of ours.
        nbytes: size in bytes.
        blob_id: sha256 of the bytes, 64 hex digits.
    """

    id: str
    tenant: str
    filename: str
    purpose: Purpose
    nbytes: int
    blob_id: str
    created_at: datetime


@dataclass(frozen=True)
class FileUsage:
    """What a tenant's quota of files counts (see `StoreLimits`)."""

    files: int
    file_bytes: int


@dataclass(frozen=True)
class Page(Generic[Item]):
    """Some of a list, and whether more follow."""

    items: tuple[Item, ...]
    has_more: bool


@dataclass(frozen=True)
class Resolved:
    """What one reference meant at the moment it was resolved."""

    given: str
    tenant: str
    name: str
    number: int | None
    tag: str | None
    digest: str
    blob_id: str
    nbytes: int
    nnz: int
