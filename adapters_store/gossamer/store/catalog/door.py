"""The one door to adapters at rest.

    upload  spool (capped, hashed on the fly) → validate → stage → put → register
    use     resolve names to digests, held → open a digest → release
    keep    list, show, download (whole, or the increment over its parents), roll back, delete
    start   recover

Everything here blocks and may be called from any thread. A caller is somebody whose key was checked
already: `tenant` is taken as true, and nothing of another tenant is ever read, or denied in other
words than what does not exist.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from datetime import datetime
from pathlib import Path
from typing import BinaryIO

from gossamer.store.blobs import Blobs
from gossamer.store.catalog import activating, reading, removing, uploading
from gossamer.store.catalog.collecting import Collector
from gossamer.store.catalog.errors import (
    AdapterCorrupt,
    AdapterNotFound,
    BlobCorrupt,
    BlobMissing,
    InvalidName,
    NoIncrement,
    UploadTooLarge,
)
from gossamer.store.catalog.holds import Held, Holds
from gossamer.store.catalog.intake import examine, read_verified
from gossamer.store.catalog.names import Ref, check_name, check_new_name, check_tag
from gossamer.store.catalog.parts import Parts
from gossamer.store.catalog.removing import Recovered
from gossamer.store.catalog.resolution import Download, Increment, Resolution
from gossamer.store.catalog.views import (
    AdapterInfo,
    BaseInfo,
    Resolved,
    StoreLimits,
    Usage,
    VersionInfo,
)
from gossamer.store.chains import increment, parents_of
from gossamer.store.clock import utc_now
from gossamer.store.delta import DeltaSet
from gossamer.store.errors import ChainError
from gossamer.store.failpoints import Failpoint, Hook, ignore
from gossamer.store.files import Files
from gossamer.store.format import digest, write
from gossamer.store.registry.database import Registry
from gossamer.store.registry.tenants import add_tenant, tenant_id, tenant_names
from gossamer.store.spool import CHUNK, Spool, read_chunks

Source = Spool | Path | BinaryIO | Iterable[bytes]


class Catalog:
    """Adapters and their versions, by tenant and name.

    Args:
        registry: migrated; the catalog does not close it.
        blobs: where the bytes lie.
        base: the base model that uploads are checked against and versions are served with.
        limits: quotas and the grace of collection.
        clock: the time now, in UTC.
        owner: True in the one server process. It alone unlinks blobs, because it alone knows its
            requests' holds; other processes (command line, training worker) only tombstone.
        failpoint: see `gossamer.store.failpoints`; pass the same to `blobs`.

    Attributes:
        files: the tenants' files, in the same blobs and with the same holds.
    """

    def __init__(
        self,
        registry: Registry,
        blobs: Blobs,
        base: BaseInfo,
        *,
        limits: StoreLimits | None = None,
        clock: Callable[[], datetime] = utc_now,
        owner: bool = False,
        failpoint: Hook = ignore,
    ) -> None:
        self._holds = Holds()
        self._parts = Parts(
            registry, blobs, base, limits or StoreLimits(), clock, owner, failpoint, self._holds
        )
        self._collector = Collector(self._parts)
        self.files = Files(self._parts, self._collector)

    # ---- upload

    def spool(self) -> Spool:
        """A temp file for an upload that arrives piece by piece: write to it, then pass it to
        `upload`, then discard it (or use it as a context). Any process."""
        return self._parts.blobs.spool()

    def upload(
        self,
        tenant: str,
        name: str,
        source: Source,
        *,
        activate: bool = True,
        tag: str | None = None,
        also: uploading.Also | None = None,
        outdated: uploading.Outdated | None = None,
    ) -> VersionInfo:
        """Validate an adapter file and keep it as a new version of `name`.

        Durable, and visible to every process, when this returns; if it raises, nothing changed.
        Any process may call it.

        Uploading is idempotent, for clients retry by themselves: a file with the digest of the
        current or of the newest version makes no new version; that one is returned, and made
        current if `activate`. Equal files share one blob, across names and tenants.

        Args:
            tenant: an existing tenant.
            name: `[a-z0-9][a-z0-9._-]*`, at most 128 characters, not the base model's.
            source: a filled `Spool`, a local file, an open binary file, or chunks of bytes.
            activate: whether the bare name means this version from now on.
            tag: `step-<n>` makes a checkpoint of a training job: never current, reached as
                `name@step-<n>`; the same tag again replaces it. Its bytes count in the quota, and
                as many more must stay free, for the result. Not for requests: the trainer's only.
            also: called with the session and the version inside the transaction that makes the
                version visible, or current, also when the upload repeats one; what it writes is
                durable together with the version or not at all. If it raises, so does `upload`,
                and nothing changed. Keep it short: other writers wait.
            outdated: of a checkpoint: called with the session, returns the tags of others of this
                name that are deleted in the transaction that makes it visible.

        Raises:
            InvalidName, ReservedName, TenantNotFound
            UploadTooLarge: more bytes than the blobs' cap.
            AdapterFileError: not an adapter, or not one for this base.
            QuotaExceeded, StoreFull, RegistryBusy, BlobStoreFailed, UploadInterrupted
        """
        check_new_name(name, self._parts.base.name)
        if tag is not None:
            check_tag(tag)
        order = uploading.Order(tenant, name, activate, tag, also, outdated)
        if isinstance(source, Spool):
            return self._upload(order, source)
        with self.spool() as spool:
            for chunk in _chunks(source):
                spool.write(chunk)
            return self._upload(order, spool)

    def _upload(self, order: uploading.Order, spool: Spool) -> VersionInfo:
        spool.seal()
        facts = examine(spool, self._parts.base, self._parts.limits.file)
        self._parts.failpoint(Failpoint.UPLOAD_VALIDATED)
        return uploading.upload(self._parts, order, spool, facts)

    # ---- use

    def resolve(self, tenant: str, refs: Sequence[Ref | str]) -> Resolution:
        """What the references mean to the tenant now, all held, or none of them.

        For the server's process: a hold binds only this catalog.

        Raises:
            AdapterNotFound: unknown, deleted, damaged, another tenant's, or no name at all.
            WrongBase: it is the tenant's, but for another base.
        """
        return self._resolve(tenant, refs, self._parts.base.fingerprint)

    def open(self, digest: str) -> DeltaSet:
        """Read a version by its digest, its bytes verified; for the engine's loader.

        A held version opens even after its deletion. One without a hold opens while it is active.

        Raises:
            AdapterNotFound: no active or held version has this digest.
            AdapterCorrupt: its bytes are damaged or gone; they are quarantined now.
            RegistryBusy, BlobStoreFailed
        """
        base, limits = self._parts.base, self._parts.limits.file
        with self._hold_digest(digest) as blob_ids:
            for blob_id in blob_ids[:-1]:
                try:
                    with self._verified(digest, blob_id) as path:
                        return read_verified(path, base, limits)
                except AdapterCorrupt:
                    continue  # another file says the same
            with self._verified(digest, blob_ids[-1]) as path:
                return read_verified(path, base, limits)

    @contextmanager
    def download(self, tenant: str, ref: Ref | str) -> Iterator[Download]:
        """A version's stored file, verified and held until the context ends. Server process only.

        Raises:
            AdapterNotFound, AdapterCorrupt, RegistryBusy, BlobStoreFailed
        """
        with self._resolve(tenant, [ref], None) as resolution:
            (version,) = resolution.versions
            with self._verified(version.digest, version.blob_id) as path:
                yield Download(version, path)

    @contextmanager
    def increment(self, tenant: str, ref: Ref | str) -> Iterator[Increment]:
        """What a version adds to the parents that its record names, written as an adapter file.

        The parents are the tenant's own versions of those digests, under whatever names. The file
        is temporary, and the same for the same versions. Server process only; reads the version
        whole, and its parents one after the other, and keeps nothing of them for the file's reader.

        Raises:
            NoIncrement: it is no child of a chain, a parent is gone or not what the record says, or
                the file would pass the blobs' cap (entries of tiles take more than the tiles).
            AdapterNotFound, WrongBase, AdapterCorrupt, StoreFull, RegistryBusy, BlobStoreFailed
        """
        with self.resolve(tenant, [ref]) as resolution, self.spool() as spool:
            (version,) = resolution.versions
            try:
                made = self._write_increment(tenant, version, spool)
            except ChainError as error:
                raise NoIncrement(version.given, error.why) from error
            except UploadTooLarge as error:  # nobody has uploaded anything
                why = f"it would be larger than the {error.limit} bytes that a file may have"
                raise NoIncrement(version.given, why) from error
            yield made

    # ---- keep

    def list(self, tenant: str) -> Sequence[AdapterInfo]:
        """A tenant's adapters by name, with their versions and checkpoints. Any process."""
        with self._parts.registry.read() as session:
            return reading.read_adapters(session, tenant)

    def show(self, tenant: str, name: str) -> AdapterInfo:
        """One adapter. Any process.

        Raises:
            AdapterNotFound
        """
        with self._parts.registry.read() as session:
            found = reading.read_adapters(session, tenant, name)
        if not found:
            raise AdapterNotFound(name)
        return found[0]

    def usage(self, tenant: str) -> Usage:
        """How much of its quota a tenant uses. Any process."""
        with self._parts.registry.read() as session:
            return reading.read_usage(session, tenant_id(session, tenant))

    def rollback(self, tenant: str, name: str, to: int | None = None) -> VersionInfo:
        """Make another version the current one: number `to`, or the one before. Any process.

        Durable when this returns. Requests that hold the version until now keep it.

        Raises:
            AdapterNotFound: no such adapter, or no such version of it.
            NoEarlierVersion: `to` is None and there is none before.
            RegistryBusy
        """
        return activating.rollback(self._parts, tenant, name, to)

    def delete(self, tenant: str, name: str, version: int | str | None = None) -> None:
        """Delete an adapter, or one version of it (a number, or a checkpoint's tag). Any process.

        Durable when this returns: nothing resolves to it any more. Its bytes go at once if nothing
        needs them, else when the last hold ends; in a process that is no owner they go when the
        server next collects.

        Raises:
            AdapterNotFound
            CurrentVersion: it is the current one of several.
            TenantNotFound, RegistryBusy
        """
        for blob_id in removing.tombstone(self._parts, tenant, name, version):
            removing.collect_quietly(self._parts, blob_id)

    # ---- tenants

    def create_tenant(self, name: str) -> None:
        """Make a tenant. Admins only, any process.

        Raises:
            InvalidName, TenantExists, RegistryBusy
        """
        check_name(name)
        with self._parts.registry.write() as session:
            add_tenant(session, name, self._parts.clock())

    def tenants(self) -> Sequence[str]:
        """The names of all tenants. Admins only, any process."""
        with self._parts.registry.read() as session:
            return tenant_names(session)

    # ---- start and end

    def recover(self) -> Recovered:
        """Clean up after crashes, and after other processes' deletes. Owner only; at start, and now
        and then. Safe beside running requests and other processes' uploads.

        Raises:
            NotOwner, RegistryBusy, BlobStoreFailed
        """
        return removing.recover(self._parts)

    def close(self) -> None:
        """Finish collecting. Holds may still be released, which then collects nothing: what they
        kept is for the next `recover`."""
        self._collector.close()

    # ---- below the door

    def _write_increment(self, tenant: str, version: Resolved, spool: Spool) -> Increment:
        # Its own file: others that say the same may have other records.
        with self._verified(version.digest, version.blob_id) as path:
            child = read_verified(path, self._parts.base, self._parts.limits.file)
        parents = parents_of(child.record)
        made = increment(child, ((p, self._parent(tenant, p.digest)) for p in parents))
        blob_id, nbytes = write(made, spool)
        spool.seal()
        return Increment(version, digest(made), blob_id, nbytes, spool.path)

    def _parent(self, tenant: str, digest: str) -> DeltaSet:
        with self._parts.registry.read() as session:
            is_there = reading.has_version(session, tenant, digest)
        try:
            if is_there:  # another tenant's would open as well
                return self.open(digest)
        except AdapterNotFound:  # deleted in between, or made for another base
            pass
        raise ChainError(f"its parent {digest} is not among your adapters for this base")

    def _resolve(self, tenant: str, refs: Sequence[Ref | str], base: str | None) -> Resolution:
        parsed = [r if isinstance(r, Ref) else _parse(r) for r in refs]
        while True:
            generation = self._holds.generation()
            with self._parts.registry.read() as session:
                found = tuple(reading.find_version(session, tenant, r, base) for r in parsed)
            if self._holds.take([Held(v.digest, v.blob_id) for v in found], generation):
                return Resolution(found, self._collector.give_back)

    @contextmanager
    def _hold_digest(self, digest: str) -> Iterator[Sequence[str]]:
        """The blobs that encode a digest, held; never an empty list."""
        fingerprint = self._parts.base.fingerprint
        while True:
            generation = self._holds.generation()
            held = self._holds.blob_of(digest)
            with self._parts.registry.read() as session:
                found = reading.find_blobs(session, digest, fingerprint)
            blob_ids = list(dict.fromkeys([*([held] if held else []), *found]))
            items = [Held(digest, blob_id) for blob_id in blob_ids]
            if self._holds.take(items, generation):
                break
        try:
            if not blob_ids:
                raise AdapterNotFound(digest)
            yield blob_ids
        finally:
            self._collector.give_back(items)

    @contextmanager
    def _verified(self, digest: str, blob_id: str) -> Iterator[Path]:
        """A blob as a file with the right bytes; a damaged one is quarantined on the way."""
        with ExitStack() as stack:
            try:
                path = stack.enter_context(self._parts.blobs.checkout(blob_id))
            except (BlobCorrupt, BlobMissing):
                removing.quarantine(self._parts, digest, blob_id)
                path = stack.enter_context(self._parts.blobs.checkout(blob_id))
            yield path


def _parse(text: str) -> Ref:
    """What cannot be a name is not found, as any other name that nobody has."""
    try:
        return Ref.parse(text)
    except InvalidName as error:
        raise AdapterNotFound(text) from error


def _chunks(source: Path | BinaryIO | Iterable[bytes]) -> Iterator[bytes]:
    if isinstance(source, Path):
        yield from read_chunks(source)
    elif hasattr(source, "read"):
        while chunk := source.read(CHUNK):
            yield chunk
    else:
        yield from source
