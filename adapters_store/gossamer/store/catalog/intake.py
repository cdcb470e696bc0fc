"""From a spooled file to what the registry will say of it: the one place that decodes uploads."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gossamer.store.catalog.views import BaseInfo
from gossamer.store.delta import Delta, DeltaSet
from gossamer.store.format import Limits as FileLimits
from gossamer.store.format import digest, open_validated
from gossamer.store.spool import Spool


@dataclass(frozen=True)
class Facts:
    """What an upload was found to say; the JSON fields are ready to be stored."""

    digest: str
    blob_id: str
    nbytes: int
    nnz: int
    density: float
    modules: list[dict[str, Any]]
    record: dict[str, Any]
    warnings: list[str]
    base_fingerprint: str
    base_verified: bool


def examine(spool: Spool, base: BaseInfo, limits: FileLimits) -> Facts:
    """Validate a sealed upload and sum it up. Nothing else has touched the bytes before.

    Raises:
        AdapterFileError: it is not an adapter that this base can be served with.
    """
    delta_set = open_validated(
        spool.path,
        base.table,
        limits=limits,
        base_fingerprint=base.fingerprint,
        serving_dtype=base.serving_dtype,
    )
    touched = sum(d.shape[0] * d.shape[1] for d in delta_set.deltas.values())
    nnz = delta_set.nnz
    verified = delta_set.base_fingerprint == base.fingerprint
    warnings = []
    if not verified:
        warnings.append(
            "The file does not say which base model it was made for; "
            "it was checked by the names and shapes of its weights only."
        )
    if nnz == 0:
        warnings.append("The adapter is empty: it answers as the base does.")
    return Facts(
        digest=digest(delta_set),
        blob_id=spool.blob_id,
        nbytes=spool.size,
        nnz=nnz,
        density=nnz / touched if touched else 0.0,
        modules=[_summary(name, delta) for name, delta in sorted(delta_set.deltas.items())],
        record=dict(delta_set.record),
        warnings=warnings,
        base_fingerprint=base.fingerprint,
        base_verified=verified,
    )


def read_verified(path: Path, base: BaseInfo, limits: FileLimits) -> DeltaSet:
    """Decode a stored file whose hash was just checked. It is validated all the same: that costs
    little beside the decoding, and the base's table may not be the one of its upload.

    Raises:
        AdapterFileError
    """
    return open_validated(
        path,
        base.table,
        limits=limits,
        base_fingerprint=base.fingerprint,
        serving_dtype=base.serving_dtype,
    )


def _summary(name: str, delta: Delta) -> dict[str, Any]:
    elements = delta.shape[0] * delta.shape[1]
    return {
        "name": name,
        "kind": delta.kind,
        "shape": list(delta.shape),
        "block_size": delta.block_size,
        "value_dtype": delta.value_dtype,
        "nnz": delta.nnz,
        "density": delta.nnz / elements if elements else 0.0,
    }
