"""Moving the current pointer without an upload."""

from __future__ import annotations

from gossamer.store.catalog.errors import AdapterNotFound, NoEarlierVersion
from gossamer.store.catalog.parts import Parts
from gossamer.store.catalog.reading import find_live_adapter, live_versions, version_info
from gossamer.store.catalog.views import VersionInfo
from gossamer.store.registry.models import ACTIVE
from gossamer.store.registry.tenants import lock_tenant


def rollback(parts: Parts, tenant: str, name: str, to: int | None) -> VersionInfo:
    """Make version `to`, or the active one before the current, current. See `door.Catalog`."""
    with parts.registry.write() as session:
        owner = lock_tenant(session, tenant)
        adapter = find_live_adapter(session, owner, name, name)
        active = {
            v.number: v
            for v in live_versions(session, adapter)
            if v.number is not None and v.status == ACTIVE
        }
        if to is not None:
            if to not in active:
                raise AdapterNotFound(f"{name}:{to}")
            target = active[to]
        else:
            current = adapter.current_number
            earlier = [n for n in active if current is not None and n < current]
            if not earlier:
                raise NoEarlierVersion(name)
            target = active[max(earlier)]
        adapter.current_number = target.number
        return version_info(target, adapter, tenant)
