"""What the backlog's modules work with, put together once by `backlog.Backlog`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime

from gossamer.jobs.views import JobLimits
from gossamer.store.registry.database import Registry


@dataclass(frozen=True)
class Parts:
    """See `backlog.Backlog` for what each one means."""

    registry: Registry
    clock: Callable[[], datetime]
    limits: JobLimits
