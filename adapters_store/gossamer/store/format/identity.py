"""The digest: what an adapter says, whatever file says it."""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Iterator

import numpy as np

from gossamer.store.delta import CARRIER, Delta, DeltaSet

_DOMAIN = b"gossamer/adapter/1\0"


def digest(delta_set: DeltaSet) -> str:
    """`sha256:<hex>` over the canonical content, as docs/format.md defines it ("Identity").

    Covered: the base fingerprint and, by weight name in byte order, kind, shape, block size, value
    dtype, scale, positions and values. Not covered: the base's name, the record, the coding, the
    order of the weights in the file. So re-compressing an adapter, or storing a seed for its
    positions, changes nothing.
    """
    state = hashlib.sha256(_DOMAIN)
    for part in _canonical(delta_set):
        state.update(part)
    return f"sha256:{state.hexdigest()}"


def _canonical(delta_set: DeltaSet) -> Iterator[bytes | memoryview]:
    yield _text(delta_set.base_fingerprint)
    names = sorted(delta_set.deltas, key=lambda name: name.encode())
    yield struct.pack("<Q", len(names))
    for name in names:
        yield _text(name)
        yield from _delta(delta_set.deltas[name])
    yield struct.pack("<Q", 0)  # the number of dense extras; this version has none


def _delta(delta: Delta) -> Iterator[bytes | memoryview]:
    yield _text(delta.kind)
    yield struct.pack("<QQQ", *delta.shape, delta.block_size)
    yield _text(delta.value_dtype)
    yield struct.pack("<fQ", delta.scale, delta.positions.size)
    yield np.ascontiguousarray(delta.positions, dtype="<i8").data
    yield np.ascontiguousarray(delta.values, dtype=CARRIER[delta.value_dtype]).data


def _text(text: str) -> bytes:
    data = text.encode()
    return struct.pack("<Q", len(data)) + data
