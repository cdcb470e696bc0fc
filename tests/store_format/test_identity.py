"""The digest, against an independent reading of the specification."""

from __future__ import annotations

import dataclasses
import hashlib
import struct

import numpy as np
from hypothesis import given

from gossamer.store.delta import Delta, DeltaSet
from gossamer.store.format import digest
from tests.store_format.strategies import delta_sets, steady


def by_the_book(delta_set: DeltaSet) -> str:
    """docs/format.md, "Identity", line by line."""

    def text(value: str) -> bytes:
        return len(value.encode()).to_bytes(8, "little") + value.encode()

    def number(value: int) -> bytes:
        return value.to_bytes(8, "little")

    content = b"gossamer/adapter/1\0" + text(delta_set.base_fingerprint)
    content += number(len(delta_set.deltas))
    for name in sorted(delta_set.deltas, key=str.encode):
        delta = delta_set.deltas[name]
        content += text(name) + text(delta.kind)
        content += number(delta.shape[0]) + number(delta.shape[1]) + number(delta.block_size)
        content += text(delta.value_dtype) + struct.pack("<f", delta.scale)
        content += number(len(delta.positions))
        content += b"".join(number(int(position)) for position in delta.positions)
        content += delta.values.tobytes()
    content += number(0)
    return "sha256:" + hashlib.sha256(content).hexdigest()


@steady
@given(delta_sets())
def test_the_digest_is_what_the_specification_says(delta_set: DeltaSet) -> None:
    assert digest(delta_set) == by_the_book(delta_set)


def test_what_is_covered_and_what_is_not() -> None:
    delta = Delta.element((4, 4), [1, 5], [1.0, 2.0], value_dtype="BF16")
    block = Delta.block((4, 4), 2, [1], np.ones((1, 2, 2)), value_dtype="BF16")
    one = DeltaSet("sha256:1", "b", {"w": delta, "v": block}, {"seed": 1})
    expected = digest(one)
    for same in (
        dataclasses.replace(one, base_name="other"),
        dataclasses.replace(one, record={}),
        dataclasses.replace(one, deltas={"v": block, "w": delta}),
    ):
        assert digest(same) == expected
    changed = [
        dataclasses.replace(delta, scale=2.0),
        dataclasses.replace(delta, positions=np.array([1, 6])),
        dataclasses.replace(delta, values=delta.values + np.uint16(1)),
        dataclasses.replace(delta, shape=(2, 8)),
        dataclasses.replace(delta, value_dtype="F16", values=delta.values.view(np.float16)),
        Delta.element((4, 4), [1, 5], [1.0, 2.0], value_dtype="F32"),
    ]
    digests = {digest(dataclasses.replace(one, deltas={"w": d, "v": block})) for d in changed}
    digests.add(digest(dataclasses.replace(one, deltas={"u": delta, "v": block})))
    digests.add(digest(dataclasses.replace(one, deltas={"w": delta})))
    digests.add(digest(dataclasses.replace(one, base_fingerprint="sha256:2")))
    digests.add(digest(dataclasses.replace(one, deltas={"w": block, "v": delta})))
    assert expected not in digests
    assert len(digests) == len(changed) + 4
