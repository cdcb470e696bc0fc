"""What a tenant may keep. Checked inside the transaction that would pass it, tenant row locked."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

import sqlalchemy as sa
from sqlalchemy.orm import Session

from gossamer.store.catalog.errors import QuotaExceeded
from gossamer.store.catalog.reading import read_usage
from gossamer.store.catalog.views import StoreLimits
from gossamer.store.registry.models import TOMBSTONED, Adapter, Version


@dataclass(frozen=True)
class Wanted:
    """A version that is to be kept.

    Attributes:
        name: the adapter's.
        blob_id, nbytes: of its file.
        is_checkpoint: whether it is one.
        going: ids of the versions that it takes the place of.
    """

    name: str
    blob_id: str
    nbytes: int
    is_checkpoint: bool
    going: Collection[int]


def check_quota(session: Session, limits: StoreLimits, tenant: int, wanted: Wanted) -> None:
    """Refuse a version that would make the tenant pass its limits.

    A checkpoint makes no adapter, and must leave room for another file of its size: what a job
    keeps on the way should not be why its result cannot be kept. (It still may: of values that have
    moved further a file can be twice as large.)

    Raises:
        QuotaExceeded
    """
    usage = read_usage(session, tenant, without=wanted.going)
    mine = (
        sa.select(Version.id)
        .join(Adapter, Adapter.id == Version.adapter_id)
        .where(Adapter.tenant_id == tenant, Version.status != TOMBSTONED)
        .where(Version.id.not_in(wanted.going))
        .limit(1)
    )
    with_blob = mine.where(Version.blob_id == wanted.blob_id)
    has_blob = session.execute(with_blob).first() is not None
    stored = usage.stored_bytes + (0 if has_blob else wanted.nbytes)
    if wanted.is_checkpoint:
        stored += wanted.nbytes
    else:
        numbered = mine.where(Adapter.name == wanted.name, Version.tag.is_(None))
        adapters = usage.adapters + (session.execute(numbered).first() is None)
        if adapters > limits.adapters:
            raise QuotaExceeded("adapters", adapters, limits.adapters)
    if stored > limits.stored_bytes:
        raise QuotaExceeded("bytes", stored, limits.stored_bytes)
