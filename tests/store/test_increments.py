"""Increments at the catalog's door; the chains themselves are tested where they are served."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest

from gossamer.store.catalog.errors import NoIncrement
from gossamer.store.chains import support_digest
from gossamer.store.delta import Delta, DeltaSet
from gossamer.store.format import digest, write
from tests.store.support import BASE, opened, temp_files


def packed(delta_set: DeltaSet) -> bytes:
    file = io.BytesIO()
    write(delta_set, file)
    return file.getvalue()


def test_one_that_is_larger_than_a_file_may_be_is_none(tmp_path: Path) -> None:
    """Of tiles with a scale: entries of 4 bytes and their positions, from 2 bytes an entry."""
    shape = BASE.table["a.weight"]
    tiles = np.random.default_rng(0).normal(size=(48, 8, 8)).astype(np.float32)

    def of(count: int, record: dict[str, object]) -> DeltaSet:
        held = Delta.block(shape, 8, np.arange(count), tiles[:count], value_dtype="BF16", scale=0.3)
        return DeltaSet(BASE.fingerprint, BASE.name, {"a.weight": held}, record)

    parent = of(1, {})
    named = {"digest": digest(parent), "support": support_digest(parent)}
    child = of(48, {"chain": [named]})
    cap = len(packed(child)) + 1000
    for upload_bytes, fits in ((cap, False), (4 * cap, True)):
        data = tmp_path / str(upload_bytes)
        with opened(data, upload_bytes=upload_bytes) as store:
            for name, adapter in (("parent", parent), ("child", child)):
                store.catalog.upload("acme", name, [packed(adapter)])
            if fits:
                with store.catalog.increment("acme", "child") as made:
                    assert cap < made.nbytes == made.path.stat().st_size < upload_bytes
            else:
                with (
                    pytest.raises(NoIncrement, match=f"larger than the {cap} bytes"),
                    store.catalog.increment("acme", "child"),
                ):
                    pass
            assert not temp_files(data)
