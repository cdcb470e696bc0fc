"""The packed adapter file: its identity, writer, validating reader and header summary.

The written specification is docs/format.md. Nothing here imports a database, torch or the
safetensors library; zstandard is imported when a compressed file is met.
"""

from gossamer.store.format.identity import digest
from gossamer.store.format.limits import DEFAULT_LIMITS, Limits
from gossamer.store.format.reader import (
    ModuleSummary,
    ServingDtype,
    Summary,
    inspect,
    open_validated,
    read,
)
from gossamer.store.format.seeded import seeded_positions
from gossamer.store.format.source import Readable
from gossamer.store.format.writer import Coding, Written, write

__all__ = [
    "DEFAULT_LIMITS",
    "Coding",
    "Limits",
    "ModuleSummary",
    "Readable",
    "ServingDtype",
    "Summary",
    "Written",
    "digest",
    "inspect",
    "open_validated",
    "read",
    "seeded_positions",
    "write",
]
