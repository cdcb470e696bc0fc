"""What the catalog's modules work with, put together once by `door.Catalog`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import datetime

from gossamer.store.blobs import Blobs
from gossamer.store.catalog.holds import Holds
from gossamer.store.catalog.moving import Moving
from gossamer.store.catalog.views import BaseInfo, StoreLimits
from gossamer.store.failpoints import Hook
from gossamer.store.registry.database import Registry


@dataclass(frozen=True)
class Parts:
    """See `door.Catalog` for what each one means."""

    registry: Registry
    blobs: Blobs
    base: BaseInfo
    limits: StoreLimits
    clock: Callable[[], datetime]
    owner: bool
    failpoint: Hook
    holds: Holds
    moving: Moving = field(default_factory=Moving)
