"""What a tenant may keep. Checked inside the transaction that would pass it, tenant row locked."""

from __future__ import annotations

import sqlalchemy as sa
from sqlalchemy.orm import Session

from gossamer.store.catalog.errors import QuotaExceeded
from gossamer.store.catalog.reading import read_usage
from gossamer.store.catalog.views import StoreLimits
from gossamer.store.registry.models import TOMBSTONED, Adapter, Version


def check_quota(
    session: Session, limits: StoreLimits, tenant: int, name: str, blob_id: str, nbytes: int
) -> None:
    """Refuse a numbered version of `name` with this blob if it would pass the tenant's limits.

    Raises:
        QuotaExceeded
    """
    usage = read_usage(session, tenant)
    mine = (
        sa.select(Version.id)
        .join(Adapter, Adapter.id == Version.adapter_id)
        .where(Adapter.tenant_id == tenant, Version.status != TOMBSTONED, Version.tag.is_(None))
        .limit(1)
    )
    has_name = session.execute(mine.where(Adapter.name == name)).first() is not None
    has_blob = session.execute(mine.where(Version.blob_id == blob_id)).first() is not None
    adapters = usage.adapters + (not has_name)
    stored = usage.stored_bytes + (0 if has_blob else nbytes)
    if adapters > limits.adapters:
        raise QuotaExceeded("adapters", adapters, limits.adapters)
    if stored > limits.stored_bytes:
        raise QuotaExceeded("bytes", stored, limits.stored_bytes)
