"""Tenants: who adapters and keys belong to. Used by the catalog and by the keys."""

from __future__ import annotations

from contextlib import suppress
from datetime import datetime

import sqlalchemy as sa
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import Session

from gossamer.store.catalog.errors import TenantExists, TenantNotFound
from gossamer.store.registry.models import Tenant


def lock_tenant(session: Session, name: str) -> Tenant:
    """The tenant's row, locked until the write transaction ends: writes of one tenant queue here,
    so what is counted against its quota cannot change meanwhile.

    Raises:
        TenantNotFound
    """
    row = session.execute(
        sa.select(Tenant).where(Tenant.name == name).with_for_update()
    ).scalar_one_or_none()
    if row is None:
        raise TenantNotFound(name)
    return row


def ensure_tenant(session: Session, name: str, now: datetime) -> Tenant:
    """The tenant's row, made if missing, and locked."""
    try:
        return lock_tenant(session, name)
    except TenantNotFound:
        # Another process may be faster, but on SQLite, where BEGIN IMMEDIATE forbids it.
        with suppress(TenantExists):
            add_tenant(session, name, now)
        return lock_tenant(session, name)


def add_tenant(session: Session, name: str, now: datetime) -> None:
    """A new tenant's row.

    Raises:
        TenantExists
    """
    try:
        with session.begin_nested():
            session.add(Tenant(name=name, created_at=now))
    except IntegrityError as error:
        raise TenantExists(name) from error


def tenant_names(session: Session) -> list[str]:
    """The names of all tenants, sorted."""
    return list(session.execute(sa.select(Tenant.name).order_by(Tenant.name)).scalars())


def tenant_id(session: Session, name: str) -> int | None:
    """The tenant's id, or None; takes no lock."""
    return session.execute(sa.select(Tenant.id).where(Tenant.name == name)).scalar_one_or_none()
