"""What can go wrong at the catalog's door, and below it in blobs, registry and keys.

Each class carries its data as attributes; the HTTP status in a docstring is the one the API's table
gives it. Messages name tenants' own names only, never a path inside the store and never a key.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from gossamer.store.errors import printable


class CatalogError(Exception):
    """Base class of everything the catalog, its blobs, its registry and its keys raise."""


class AdapterNotFound(CatalogError):
    """404: no such adapter or version, deleted, quarantined, or another tenant's. One message for
    all of them, so that nobody learns which."""

    def __init__(self, given: str) -> None:
        self.given = given
        super().__init__(
            f"The model '{printable(given)}' does not exist or you do not have access to it."
        )


class TenantNotFound(CatalogError):
    """404: the tenant itself is unknown (an operator's mistake: keys name existing tenants)."""

    def __init__(self, tenant: str) -> None:
        self.tenant = tenant
        super().__init__(f"There is no tenant '{printable(tenant)}'.")


class TenantExists(CatalogError):
    """409: a tenant of this name exists."""

    def __init__(self, tenant: str) -> None:
        self.tenant = tenant
        super().__init__(f"A tenant named '{printable(tenant)}' exists already.")


class InvalidName(CatalogError):
    """400: the text cannot name an adapter, a version or a tenant."""

    def __init__(self, given: str, why: str) -> None:
        self.given, self.why = given, why
        super().__init__(f"'{printable(given)}' is not a valid name: {why}.")


class ReservedName(CatalogError):
    """400: the name belongs to the base model."""

    def __init__(self, name: str) -> None:
        self.name = name
        super().__init__(f"The name {name!r} is the base model's own; choose another.")


class UploadTooLarge(CatalogError):
    """413: more bytes came than one file may have."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        super().__init__(f"The file is larger than the limit of {limit} bytes.")


class QuotaExceeded(CatalogError):
    """The tenant would pass its quota: 409 for a number (`adapters`, `files`), 413 for bytes
    (`bytes` of adapters, `file bytes`)."""

    def __init__(
        self,
        what: Literal["adapters", "bytes", "files", "file bytes"],
        wanted: int,
        limit: int,
    ) -> None:
        self.what, self.wanted, self.limit = what, wanted, limit
        way_out = "a file" if what.startswith("file") else "an adapter or a version"
        super().__init__(
            f"This would make {wanted} {what} of at most {limit} for the tenant; "
            f"delete {way_out} first."
        )


class UploadInterrupted(CatalogError):
    """409, may be retried: the upload stood still for longer than the grace, its bytes were
    collected, and nothing was registered."""

    def __init__(self, name: str) -> None:
        self.name = name
        super().__init__(f"The upload of {name!r} took too long and was dropped; send it again.")


class CurrentVersion(CatalogError):
    """409: the current version of an adapter with other versions cannot be deleted by itself."""

    def __init__(self, name: str, number: int) -> None:
        self.name, self.number = name, number
        super().__init__(
            f"{name}:{number} is the current version of {name!r}; "
            "roll back to another version first, or delete the whole adapter."
        )


class NoEarlierVersion(CatalogError):
    """409: there is no version to roll back to."""

    def __init__(self, name: str) -> None:
        self.name = name
        super().__init__(f"{name!r} has no earlier version to roll back to.")


class WrongBase(CatalogError):
    """422 `base_model_mismatch`: the version was uploaded for another base model."""

    def __init__(self, given: str, made_for: str, loaded: str) -> None:
        self.given, self.made_for, self.loaded = given, made_for, loaded
        super().__init__(
            f"'{printable(given)}' was made for the base with fingerprint {made_for[:16]}…, "
            f"and this server runs {loaded[:16]}…."
        )


class NoIncrement(CatalogError):
    """409 `no_increment`: a version cannot be told apart from its parents. It is no child of a
    chain, or a parent is not there any more, or its record is wrong about one, or what it adds
    would take a larger file than one may be."""

    def __init__(self, given: str, why: str) -> None:
        self.given, self.why = given, why
        super().__init__(f"There is no increment of '{printable(given)}': {why}.")


class AdapterCorrupt(CatalogError):
    """409 `adapter_corrupt`: the stored bytes are gone or are not those that were uploaded. The
    version is quarantined; uploading the same file again restores it."""

    def __init__(self, digest: str, why: str) -> None:
        self.digest, self.why = digest, why
        super().__init__(f"The stored adapter {digest[:19]}… is damaged ({why}); upload it again.")


class FileNotFound(CatalogError):
    """404: no such file, deleted, or another tenant's. One message for all of them, so that nobody
    learns which."""

    def __init__(self, given: str) -> None:
        self.given = given
        super().__init__(
            f"The file '{printable(given)}' does not exist or you do not have access to it."
        )


class InvalidFilename(CatalogError):
    """400: the text cannot be the name of a file."""

    def __init__(self, given: str, why: str) -> None:
        self.given, self.why = given, why
        super().__init__(f"'{printable(given)}' is not a valid file name: {why}.")


class FileCorrupt(CatalogError):
    """409 `file_corrupt`: the stored bytes are gone or are not those that were uploaded. Uploading
    the same bytes again restores the file."""

    def __init__(self, file_id: str, why: str) -> None:
        self.file_id, self.why = file_id, why
        super().__init__(f"The stored file {file_id} is damaged ({why}); upload it again.")


class BlobMissing(CatalogError):
    """No blob of this id; whoever needs it turns it into `AdapterCorrupt` or `FileCorrupt`."""

    def __init__(self, blob_id: str) -> None:
        self.blob_id = blob_id
        super().__init__(f"There is no blob {blob_id}.")


class BlobCorrupt(CatalogError):
    """The bytes of a blob do not have its sha256; see `BlobMissing`."""

    def __init__(self, blob_id: str, found: str) -> None:
        self.blob_id, self.found = blob_id, found
        super().__init__(f"Blob {blob_id} reads back with sha256 {found}.")


class BlobMoving(CatalogError):
    """The blob is being removed or moved aside: whoever wants to claim it waits."""

    def __init__(self, blob_id: str) -> None:
        self.blob_id = blob_id
        super().__init__(f"Blob {blob_id} is being taken away.")


class BlobStoreFailed(CatalogError):
    """503: the blob store answered an operation with an error of its own."""

    def __init__(self, operation: str, why: str) -> None:
        self.operation, self.why = operation, why
        super().__init__(f"The blob store failed to {operation}: {why}.")


class BlobsUrlInvalid(CatalogError):
    """At start only: the URL cannot name a blob store. The message does not quote it, because a
    URL that is refused may hold a secret."""

    def __init__(self, why: str) -> None:
        self.why = why
        super().__init__(f"The URL of the blob store cannot be used: {why}.")


class BlobsNotOurs(CatalogError):
    """At start only: the blob store is another registry's, or not the one that this registry's
    blobs are in. `mark` is what it would have to be marked with."""

    def __init__(self, why: str, mark: str) -> None:
        self.why, self.mark = why, mark
        super().__init__(f"The blob store is not the one of this registry: {why}.")


class StoreFull(CatalogError):
    """507: no room left for a blob or for the registry. Nothing was registered."""

    def __init__(self, where: Literal["blobs", "registry"], why: str) -> None:
        self.where, self.why = where, why
        super().__init__(f"No space is left for the {where}: {why}.")


class RegistryBusy(CatalogError):
    """503 with retry-after: another writer kept the registry locked for the whole wait. Nothing was
    written; reading still works."""

    def __init__(self, waited_s: float) -> None:
        self.waited_s = waited_s
        super().__init__(f"The registry stayed locked for {waited_s:g} s; try again.")


class RegistryTooNew(CatalogError):
    """At start only: the database was written by a later release, which this one cannot read."""

    def __init__(self, revision: str) -> None:
        self.revision = revision
        super().__init__(
            f"The registry is at revision {revision!r}, which this release does not know; "
            "run the release that wrote it, or a later one."
        )


class NotOwner(CatalogError):
    """A process opened without `owner=True` asked for what only the server may do."""

    def __init__(self, operation: str) -> None:
        self.operation = operation
        super().__init__(f"Only the server process may {operation}.")


class AlreadyOwned(CatalogError):
    """At start only: another server process has the data folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        super().__init__(f"Another server runs on the data folder {folder}; stop it first.")


class InvalidKey(CatalogError):
    """401 `invalid_api_key`: malformed, unknown, wrong, expired or revoked. It says no more."""

    def __init__(self) -> None:
        super().__init__("The API key is not valid.")


class KeyNotFound(CatalogError):
    """404: no key of this id."""

    def __init__(self, key_id: str) -> None:
        self.key_id = key_id
        super().__init__(f"There is no API key with the id '{printable(key_id)}'.")


class KeySecretUnsafe(CatalogError):
    """At start only: the file with the server's secret is damaged or open to other users."""

    def __init__(self, path: Path, why: str) -> None:
        self.path, self.why = path, why
        super().__init__(f"The key secret {path} cannot be used: {why}.")
