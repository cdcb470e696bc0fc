"""Write, read, equal; one digest for every coding; damage is noticed where the format can."""

from __future__ import annotations

import hashlib
import io
import math
from typing import Any, get_args

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gossamer.store.delta import Delta, DeltaSet
from gossamer.store.errors import AdapterFileError, DeltaError
from gossamer.store.format import (
    Coding,
    Limits,
    digest,
    inspect,
    open_validated,
    read,
    seeded_positions,
    write,
)
from tests.store_format.strategies import delta_sets, same, steady

CODINGS = get_args(Coding)


def written(delta_set: DeltaSet, **options) -> bytes:
    buffer = io.BytesIO()
    blob_id, size = write(delta_set, buffer, **options)
    data = buffer.getvalue()
    assert size == len(data)
    assert blob_id == hashlib.sha256(data).hexdigest()
    return data


@steady
@given(delta_sets(), st.sampled_from(CODINGS))
def test_what_was_written_is_read(delta_set: DeltaSet, coding: Coding) -> None:
    data = written(delta_set, coding=coding)
    table = {name: delta.shape for name, delta in delta_set.deltas.items()}
    opened = open_validated(data, table, base_fingerprint=delta_set.base_fingerprint or None)
    assert same(opened, delta_set)
    assert list(opened.deltas) == sorted(delta_set.deltas, key=lambda name: name.encode())
    assert digest(opened) == digest(delta_set)
    assert same(read(data), delta_set)
    assert written(opened, coding=coding) == data


@steady
@given(delta_sets())
def test_inspect_says_what_decoding_finds(delta_set: DeltaSet) -> None:
    for coding in CODINGS:
        summary = inspect(written(delta_set, coding=coding))
        assert summary.nnz == delta_set.nnz
        assert summary.record == delta_set.record
        for module in summary.modules:
            delta = delta_set.deltas[module.name]
            assert (module.kind, module.shape, module.block_size) == (
                delta.kind,
                delta.shape,
                delta.block_size,
            )
            assert (module.nnz, module.value_dtype) == (delta.nnz, delta.value_dtype)
        held = sum(d.positions.nbytes + d.values.nbytes for d in delta_set.deltas.values())
        assert summary.decoded_bytes == held


def a_set(coding: Coding = "zstd", count: int = 40) -> tuple[DeltaSet, bytes]:
    generator = np.random.default_rng(5)
    where = np.sort(generator.choice(64 * 48, count, replace=False))
    values = generator.normal(size=count)
    tiles = generator.normal(size=(2, 8, 8))
    delta_set = DeltaSet(
        "sha256:" + "0f" * 32,
        "b",
        {
            "a": Delta.element((64, 48), where, values, value_dtype="BF16"),
            "b": Delta.block((20, 30), 8, [1, 11], tiles, value_dtype="BF16"),
        },
    )
    return delta_set, written(delta_set, coding=coding)


def flips(data: bytes) -> list[tuple[int, bytes]]:
    """Every byte of `data` with one bit, and with all bits, turned."""
    turned = []
    for at in range(len(data)):
        for mask in (1 << at % 8, 0xFF):
            damaged = bytearray(data)
            damaged[at] ^= mask
            turned.append((at, bytes(damaged)))
    return turned


def test_a_flipped_byte_of_compressed_data_is_refused_or_changes_nothing() -> None:
    delta_set, data = a_set()
    table = {name: delta.shape for name, delta in delta_set.deltas.items()}
    body = 8 + int.from_bytes(data[:8], "little")
    expected, refused = digest(delta_set), 0
    for at, damaged in flips(data):
        try:
            opened = open_validated(damaged, table, base_fingerprint=delta_set.base_fingerprint)
        except AdapterFileError:
            refused += 1
            continue
        # In the header a flip may say something else that is well-formed: another record, another
        # scale. The blob id, a hash of all bytes, is what notices that.
        assert at < body or digest(opened) == expected
    assert refused > len(data)


def test_a_flipped_byte_of_a_raw_file_never_does_worse_than_another_adapter() -> None:
    # Plain numbers carry no checksum: a flipped value is another value. What is opened still keeps
    # every rule, and the blob id differs.
    delta_set, data = a_set("raw")
    table = {name: delta.shape for name, delta in delta_set.deltas.items()}
    changed = 0
    for _, damaged in flips(data):
        try:
            opened = open_validated(damaged, table)
        except AdapterFileError:
            continue
        changed += digest(opened) != digest(delta_set)
        for delta in opened.deltas.values():
            assert np.isfinite(delta.values_f32()).all()
            assert delta.dense().shape == delta.shape
    assert changed


def test_a_truncated_file_is_refused_everywhere() -> None:
    _, data = a_set()
    for size in range(len(data)):
        with pytest.raises(AdapterFileError):
            read(data[:size])


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=200))
def test_noise_is_refused(noise: bytes) -> None:
    with pytest.raises(AdapterFileError):
        read(noise)


def test_a_seed_and_its_positions_have_one_digest() -> None:
    generator = np.random.default_rng(1)
    shapes = {"a": (40, 50), "b": (30, 33)}
    deltas = {}
    for name, shape in shapes.items():
        where = seeded_positions(99, name, math.prod(shape), 60)
        deltas[name] = Delta.element(shape, where, generator.normal(size=60), value_dtype="BF16")
    tiles = seeded_positions(99, "c", 12, 5)
    deltas["c"] = Delta.block((30, 40), 10 - 2, tiles[tiles < 12], generator.normal(size=(5, 8, 8)))
    delta_set = DeltaSet("", "b", deltas)
    explicit = written(delta_set)
    seeds = {"a": 99, "b": 99}
    for coding in CODINGS:
        short = written(delta_set, coding=coding, seeds=seeds)
        assert same(read(short), delta_set)
        assert digest(read(short)) == digest(read(explicit))
    assert {m.coding for m in inspect(written(delta_set, seeds=seeds)).modules[:2]} == {
        "seed+planes"
    }
    with pytest.raises(DeltaError, match="do not come from seed 98") as refused:
        written(delta_set, seeds={"a": 98})
    assert refused.value.tensor == "a"
    with pytest.raises(DeltaError, match="no delta"):
        written(delta_set, seeds={"nowhere": 1})


def test_many_small_weights_share_groups_and_a_large_one_stands_alone() -> None:
    deltas = {
        f"w{i:04}": Delta.element((8, 8), [i % 64], [1.0], value_dtype="BF16") for i in range(3000)
    }
    large = np.arange(0, 3_000_000, 2)
    deltas["large"] = Delta.element((3000, 1000), large, np.ones(large.size), value_dtype="BF16")
    delta_set = DeltaSet("", "b", deltas)
    for coding in CODINGS:
        assert same(read(written(delta_set, coding=coding)), delta_set)


def test_positions_beyond_32_bits_round_trip() -> None:
    numel = 2**40
    where = np.array([0, 1, 2**31, 2**32, 2**39, numel - 1])
    delta = Delta.element((2**20, 2**20), where, np.ones(6))
    for coding in CODINGS:
        assert read(written(DeltaSet("", "b", {"a": delta}), coding=coding)).deltas[
            "a"
        ].positions.tolist() == list(where)


def test_an_adapter_of_zeros_stays_readable() -> None:
    # Compressed it would be thousands of times smaller than what it decodes to, which readers
    # refuse; the writer falls back to plain numbers.
    count = 7_000_000
    delta = Delta.element((7000, 1000), np.arange(count), np.zeros(count, np.float32))
    delta_set = DeltaSet("", "b", {"a": delta})
    with pytest.raises(AdapterFileError, match="times the file's size"):
        read(written(delta_set, coding="zstd"))
    assert read(written(delta_set)).nnz == count


def test_the_writer_refuses_what_readers_would() -> None:
    unsorted = Delta("element", (2, 2), 1, np.array([1, 0]), np.ones(2, np.float32), "F32")
    with pytest.raises(DeltaError) as refused:
        written(DeltaSet("", "b", {"w": unsorted}))
    assert (refused.value.tensor, refused.value.position) == ("w", 1)
    long = DeltaSet("", "b", {}, {"note": "x" * (1 << 20)})
    with pytest.raises(DeltaError, match="record is too long"):
        written(long)
    record: dict[str, Any] = {}
    for _ in range(63):
        record = {"a": record}
    assert read(written(DeltaSet("", "b", {}, record))).record == record
    with pytest.raises(DeltaError, match="more than 64 levels"):
        written(DeltaSet("", "b", {}, {"a": record}))
    one = Delta.element((1, 1), [0], [1.0])
    with pytest.raises(DeltaError, match="at most 4096"):
        written(DeltaSet("", "b", {str(index): one for index in range(4097)}))
    with pytest.raises(ValueError, match="JSON"):
        written(DeltaSet("", "b", {}, {"loss": math.nan}))


def test_a_path_and_an_open_file_work_alike(tmp_path) -> None:
    delta_set, data = a_set()
    path = tmp_path / "a.safetensors"
    assert write(delta_set, path, coding="zstd").size == len(data)
    assert path.read_bytes() == data
    with path.open("rb") as file:
        assert same(read(file), delta_set)
        assert not file.closed
    assert same(read(str(path)), delta_set)
    assert same(read(memoryview(data)), delta_set)
    path.unlink()
    with pytest.raises(FileNotFoundError):
        read(path)


def test_nothing_decoded_refers_to_the_file() -> None:
    for coding in CODINGS:
        _, data = a_set(coding)
        memory = bytearray(data)
        opened = read(memory)
        before = digest(opened)
        memory[:] = bytes(len(memory))
        assert digest(opened) == before
        assert all(delta.values.flags.writeable for delta in opened.deltas.values())


def test_limits_have_a_default_that_fits_the_largest_upload() -> None:
    assert Limits().max_file_bytes == 512 << 20
