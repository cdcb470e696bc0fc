"""API keys: made once, shown once, kept only as an HMAC.

A key reads `sk-<id>-<secret>`: 12 and 64 hex digits. The registry stores HMAC-SHA-256 of the whole
text under a secret that lies in a file of its own, so a copy of the database alone verifies nothing
and reveals nothing.

Verification takes one path, whatever is wrong: one query that always returns one row, one HMAC, one
constant-time comparison, and only then one decision over all conditions.
"""

from __future__ import annotations

import hashlib
import hmac
import os
import re
import secrets
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal, cast

import sqlalchemy as sa
from sqlalchemy.orm import Session

from gossamer.store.catalog.errors import (
    InvalidKey,
    KeyNotFound,
    KeySecretUnsafe,
)
from gossamer.store.clock import utc_now
from gossamer.store.registry.database import Registry
from gossamer.store.registry.models import ApiKey, Tenant
from gossamer.store.registry.tenants import ensure_tenant, lock_tenant
from gossamer.store.spool import sync_folder

Scope = Literal["admin", "user"]

_SECRET_BYTES = 32
_KEY = re.compile(r"sk-([0-9a-f]{12})-[0-9a-f]{64}")
#: longer texts are cut before they are hashed; a key has 80 characters
_MAX_TEXT = 256
#: stands in for the id of a malformed key; `token_hex` never makes it (letters past f)
_NO_ID = "zzzzzzzzzzzz"
_NO_MAC = bytes(_SECRET_BYTES)
# Outer joins from a row that is always there: the query for an unknown id has a result too.
_ONE = sa.select(sa.literal(1).label("one")).subquery()
_BY_ID = (
    sa.select(ApiKey.mac, ApiKey.scope, ApiKey.expires_at, ApiKey.revoked_at, Tenant.name)
    .select_from(_ONE)
    .outerjoin(ApiKey, ApiKey.id == sa.bindparam("key_id"))
    .outerjoin(Tenant, Tenant.id == ApiKey.tenant_id)
)
_NEVER = datetime.max.replace(tzinfo=UTC)


@dataclass(frozen=True)
class Principal:
    """Who a verified key speaks for."""

    tenant: str
    scope: Scope
    key_id: str


@dataclass(frozen=True)
class KeyInfo:
    """What may be shown of a key."""

    key_id: str
    tenant: str
    scope: Scope
    label: str
    created_at: datetime
    expires_at: datetime | None
    revoked_at: datetime | None


@dataclass(frozen=True)
class NewKey:
    """A key just made. `text` exists here and nowhere else; a repr leaves it out."""

    info: KeyInfo
    text: str = field(repr=False)


class KeyRing:
    """Makes, verifies and revokes keys. Thread-safe; several processes may share a registry.

    Args:
        registry: migrated.
        secret: the HMAC key, see `load_secret`.
        clock: the time now, in UTC.
    """

    def __init__(
        self, registry: Registry, secret: bytes, *, clock: Callable[[], datetime] = utc_now
    ) -> None:
        self._registry = registry
        self._secret = secret
        self._clock = clock

    def create(
        self,
        tenant: str,
        scope: Scope = "user",
        *,
        label: str = "",
        expires_at: datetime | None = None,
    ) -> NewKey:
        """A new key for an existing tenant; durable when this returns. Admins only.

        Raises:
            TenantNotFound, RegistryBusy
        """
        with self._registry.write() as session:
            return self._add(session, lock_tenant(session, tenant), scope, label, expires_at)

    def ensure_first_admin(self, tenant: str) -> NewKey | None:
        """The first admin key, for a tenant that is made if missing; None when any admin key was
        ever made. Of several processes that start at once one gets it. For the server's start.
        """
        with self._registry.write() as session:
            row = ensure_tenant(session, tenant, self._clock())
            made = sa.select(ApiKey.id).where(ApiKey.scope == "admin").limit(1)
            if session.execute(made).first() is not None:
                return None
            return self._add(session, row, "admin", "first admin key", None)

    def verify(self, text: str) -> Principal:
        """Who the key speaks for. Takes equally long for every invalid key.

        Raises:
            InvalidKey: malformed, unknown, wrong, expired or revoked; it does not say which.
        """
        match = _KEY.fullmatch(text)
        mac = self._mac(text)
        with self._registry.read() as session:
            row = session.execute(_BY_ID, {"key_id": match[1] if match else _NO_ID}).one()
        expires_at = _NEVER if row.expires_at is None else row.expires_at
        conditions = (
            hmac.compare_digest(mac, _NO_MAC if row.mac is None else row.mac),
            row.mac is not None,
            row.revoked_at is None,
            self._clock() < expires_at,
        )
        if match is None or not all(conditions):
            raise InvalidKey
        return Principal(row.name, cast(Scope, row.scope), match[1])

    def list(self, tenant: str | None = None) -> list[KeyInfo]:
        """The keys of a tenant, or of all, by age; revoked and expired ones too. Admins only."""
        query = sa.select(ApiKey, Tenant.name).join(Tenant, Tenant.id == ApiKey.tenant_id)
        if tenant is not None:
            query = query.where(Tenant.name == tenant)
        with self._registry.read() as session:
            rows = session.execute(query.order_by(ApiKey.created_at, ApiKey.id)).all()
        return [_shown(key, name) for key, name in rows]

    def revoke(self, key_id: str) -> None:
        """End a key; every verification that starts after this returns fails. Admins only.

        Raises:
            KeyNotFound, RegistryBusy
        """
        with self._registry.write() as session:
            key = session.get(ApiKey, key_id, with_for_update=True)
            if key is None:
                raise KeyNotFound(key_id)
            if key.revoked_at is None:
                key.revoked_at = self._clock()

    def _mac(self, text: str) -> bytes:
        data = text[:_MAX_TEXT].encode("utf-8", "surrogatepass")
        return hmac.digest(self._secret, data, hashlib.sha256)

    def _add(
        self,
        session: Session,
        tenant: Tenant,
        scope: Scope,
        label: str,
        expires_at: datetime | None,
    ) -> NewKey:
        key_id = secrets.token_hex(6)
        text = f"sk-{key_id}-{secrets.token_hex(_SECRET_BYTES)}"
        row = ApiKey(
            id=key_id,
            tenant_id=tenant.id,
            mac=self._mac(text),
            scope=scope,
            label=label,
            created_at=self._clock(),
            expires_at=expires_at,
        )
        session.add(row)
        return NewKey(_shown(row, tenant.name), text)


def load_secret(path: Path) -> bytes:
    """The server's HMAC key: 32 random bytes in a file of mode 0600, made when missing.

    Of several processes that start at once one makes it and all read the same.

    Raises:
        KeySecretUnsafe: the file is damaged, or readable by every user of the machine.
    """
    try:
        secret, mode = path.read_bytes(), path.stat().st_mode
    except FileNotFoundError:
        _make_secret(path)
        secret, mode = path.read_bytes(), path.stat().st_mode
    if mode & 0o007:
        raise KeySecretUnsafe(path, "other users can open it; run chmod 600 on it")
    if len(secret) != _SECRET_BYTES:
        raise KeySecretUnsafe(path, f"it has {len(secret)} bytes in place of {_SECRET_BYTES}")
    return secret


def _make_secret(path: Path) -> None:
    temp = path.with_name(f"{path.name}.{secrets.token_hex(8)}")
    handle = os.open(temp, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(secrets.token_bytes(_SECRET_BYTES))
            file.flush()
            os.fsync(file.fileno())
        # link() is a rename that never replaces: who comes second keeps the first one's secret
        try:
            path.hardlink_to(temp)
        except FileExistsError:
            return
        sync_folder(path.parent)
    finally:
        temp.unlink()


def _shown(key: ApiKey, tenant: str) -> KeyInfo:
    return KeyInfo(
        key_id=key.id,
        tenant=tenant,
        scope=cast(Scope, key.scope),
        label=key.label,
        created_at=key.created_at,
        expires_at=key.expires_at,
        revoked_at=key.revoked_at,
    )
