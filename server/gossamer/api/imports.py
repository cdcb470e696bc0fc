"""Adapters of other libraries, uploaded as their files are."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from gossamer.store.catalog.door import Catalog
from gossamer.store.catalog.names import check_new_name
from gossamer.store.catalog.views import VersionInfo
from gossamer.store.exchange.base import BaseWeights
from gossamer.store.exchange.files import Files
from gossamer.store.exchange.packing import pack_upload
from gossamer.store.exchange.registry import importers
from gossamer.store.format import Limits
from gossamer.store.spool import Spool


def is_foreign(files: Mapping[str, Spool]) -> bool:
    """Whether the files are called as those of another library's adapter that is taken here."""
    given = Files({filename: spool.path for filename, spool in files.items()})
    return any(importer.detect(given) for importer in importers(uploadable=True).values())


def upload_files(
    catalog: Catalog,
    base: BaseWeights,
    limits: Limits,
    tenant: str,
    name: str,
    files: Mapping[str, Spool],
    *,
    activate: bool,
) -> VersionInfo:
    """Convert the files of one adapter, and keep the result as a new version of `name`.

    Blocks, and takes the memory of the adapter decoded, and of its largest weight three times over
    (`packing`): the most that it could be is held against `limits` before a tensor is read.

    Args:
        base: names and shapes are enough.
        limits: what the adapter may take decoded.
        files: by the names that the other library gives them.

    Returns:
        The version, with what its sender should know of the conversion among the warnings.

    Raises:
        AdapterFileError: they are no adapter of a format that is taken here, or not for this base.
        what `Catalog.upload` raises.
    """
    check_new_name(name, base.name)
    for spool in files.values():
        spool.seal()
    given = Files({filename: spool.path for filename, spool in files.items()})
    with catalog.spool() as spool:
        packed = pack_upload(given, base, spool, limits)
        version = catalog.upload(tenant, name, spool, activate=activate)
    return replace(version, warnings=(*packed.warnings, *version.warnings))
