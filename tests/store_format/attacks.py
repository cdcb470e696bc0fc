"""Hostile and broken adapter files, each with the code it must be refused with.

Reusable: `attacks(table, fingerprint)` makes them for any base, so the same corpus goes through the
format's own tests and through the upload route.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np

from tests.store_format import foreign, headers
from tests.store_format.container import (
    bf16,
    container,
    frame,
    group,
    metadata,
    module,
    positions,
    squeezed,
)

ONE = 0x3F80  # 1.0 in bfloat16
INVALID = "invalid_adapter_file"


class Attack(NamedTuple):
    """Bytes that must be refused with `code`.

    `entry` is the index of the offending entry where the refusal must name one, and `weight` says
    whether it must name the weight.
    """

    name: str
    data: bytes
    code: str
    entry: int | None = None
    weight: bool = False


class Target(NamedTuple):
    """The weight that the attacks aim at."""

    name: str
    shape: tuple[int, int]
    fingerprint: str

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    def raw(self, where: list[int], bits: list[int] | None = None, **changes: Any) -> bytes:
        """A raw file with these positions and bfloat16 values; valid unless they are not."""
        values = [ONE] * len(where) if bits is None else bits
        row = group(module(self.name, self.shape, len(where)), **changes)
        tensors = [positions(self.name, where), bf16(self.name, values)]
        return container(metadata([row], self.fingerprint), tensors)


def attacks(table: Mapping[str, tuple[int, int]], fingerprint: str) -> Iterator[Attack]:
    """Every attack, aimed at the first weight of `table` (at least 4 × 4)."""
    name = min(table)
    target = Target(name, table[name], fingerprint)
    for label, data in headers.malformed():
        yield Attack(f"header: {label}", data, INVALID)
    for label, data in headers.bombs():
        yield Attack(f"bomb: {label}", data, INVALID)
    for label, data in foreign.files():
        yield Attack(f"foreign: {label}", data, "unsupported_file")
    yield from bad_positions(target)
    yield from bad_values(target)
    yield from bad_layouts(target)
    yield from bad_frames(target)
    yield from too_large(target)
    yield from wrong_base(target)
    yield from bad_names(target)


def bad_positions(target: Target) -> Iterator[Attack]:
    numel = target.numel
    cases: list[tuple[str, list[int], int]] = [
        ("numel", [0, 1, numel], 2),
        ("minus one", [-1, 0, 1], 0),
        ("minus one at the end", [0, 1, -1], 2),
        ("2^63 - 1", [0, 2**63 - 1], 1),
        ("-2^63", [-(2**63), 0], 0),
        ("unsorted", [0, 5, 3], 2),
        ("duplicate", [0, 3, 3], 2),
        ("2^32 + 1, which a cast to 32 bits would accept", [0, 2**32 + 1], 1),
    ]
    for label, where, entry in cases:
        yield Attack(f"positions: {label}", target.raw(where), INVALID, entry, weight=True)
    row = group(module(target.name, target.shape, 3))
    strings = metadata([row], target.fingerprint)
    values = bf16(target.name, [ONE] * 3)
    as_floats = positions(target.name, [0, 1, 2], "F32")
    pairs = (f"{target.name}.positions", "I64", [3, 2], b"\0" * 48)
    short = positions(target.name, [0, 1])
    for label, tensor in (("float", as_floats), ("two dimensions", pairs), ("too few", short)):
        yield Attack(f"positions: {label}", container(strings, [tensor, values]), INVALID)


def bad_values(target: Target) -> Iterator[Attack]:
    for label, bits in (
        ("NaN", 0x7FC0),
        ("negative NaN", 0xFFC1),
        ("infinity", 0x7F80),
        ("minus infinity", 0xFF80),
        ("1e38", 0x7E96),
    ):
        data = target.raw([0, 2, 4], [ONE, bits, ONE])
        yield Attack(f"values: {label}", data, INVALID, 1, weight=True)
    for dtype, carrier in (("F16", "<f2"), ("F32", "<f4")):
        row = group(module(target.name, target.shape, 2), dtype=dtype)
        data = np.array([1.0, math.inf], carrier).tobytes()
        tensors = [positions(target.name, [0, 1]), (f"{target.name}.values", dtype, [2], data)]
        file = container(metadata([row], target.fingerprint), tensors)
        yield Attack(f"values: infinity in {dtype}", file, INVALID, 1, weight=True)
    scaled = group(module(target.name, target.shape, 1, scale=2.0**100))
    tensors = [positions(target.name, [0]), bf16(target.name, [0x7180])]
    file = container(metadata([scaled], target.fingerprint), tensors)
    yield Attack("values: overflow by the scale", file, INVALID, 0, weight=True)
    yield from _ragged(target)


def _ragged(target: Target) -> Iterator[Attack]:
    size = next(b for b in (8, 16, 32, 64, 128, 4, 2) if target.shape[1] % b or b == 2)
    if target.shape[1] % size == 0:
        return
    columns = -(-target.shape[1] // size)
    tile = np.full((1, size, size), ONE, "<u2")
    inside = min(size, target.shape[0]) * (target.shape[1] % size)
    row = group(module(target.name, target.shape, inside, tiles=1), kind="block", block_size=size)
    tensors = [
        positions(target.name, [columns - 1]),
        (f"{target.name}.values", "BF16", [1, size, size], tile.tobytes()),
    ]
    file = container(metadata([row], target.fingerprint), tensors)
    yield Attack("values: outside the weight in a ragged tile", file, INVALID, 0, weight=True)


def bad_layouts(target: Target) -> Iterator[Attack]:
    good = module(target.name, target.shape, 2)
    tensors = [positions(target.name, [0, 1]), bf16(target.name, [ONE, ONE])]

    def file(groups: Any, **more: str) -> bytes:
        return container(metadata(groups, target.fingerprint, **more), tensors)

    groups: dict[str, Any] = {
        "not a list": {"a": 1},
        "null": "null",
        "a number in the list": [1],
        "no modules": [group()],
        "modules not a list": [group(good, modules={})],
        "unknown kind": [group(good, kind="lora")],
        "kind a list": [group(good, kind=["element"])],
        "block size of an element": [group(good, block_size=2)],
        "block size 3": [group(good, kind="block", block_size=3)],
        "block size true": [group(good, block_size=True)],
        "block size 2^40": [group(good, kind="block", block_size=2**40)],
        "unknown dtype": [group(good, dtype="F64")],
        "dtype a list": [group(good, dtype=["BF16"])],
        "unknown positions": [group(good, positions="zip")],
        "positions a list": [group(good, positions=["raw"])],
        "unknown values": [group(good, values="zip")],
        "unknown group field": [group(good, evil=1)],
        "shift without gaps": [group(good, shift=4)],
        "shift 64": [group(good, positions="gaps", shift=64, high_planes=1)],
        "a million planes": [group(good, positions="gaps", shift=0, high_planes=10**6)],
        "no planes": [group(good, positions="gaps", shift=0, high_planes=0)],
        "unknown module field": [group(good | {"evil": 1})],
        "no name": [group({"shape": [4, 4], "nnz": 2})],
        "name a number": [group(good | {"name": 1})],
        "the weight twice": [group(good), group(good)],
        "the weight twice in a group": [group(good, good)],
        "names out of order": [group(module("z", (4, 4), 1), module("a", (4, 4), 1))],
        "nnz beyond numel": [group(good | {"nnz": target.numel + 1})],
        "nnz negative": [group(good | {"nnz": -1})],
        "nnz true": [group(good | {"nnz": True})],
        "nnz a float": [group(good | {"nnz": 2.0})],
        "nnz 10^400": [group(good | {"nnz": 10**400})],
        "shape of one side": [group(good | {"shape": [16]})],
        "shape negative": [group(good | {"shape": [-4, -4]})],
        "shape empty": [group(good | {"shape": [0, 4], "nnz": 0})],
        "shape of 2^60 entries": [group(good | {"shape": [2**30, 2**30]})],
        "scale zero": [group(good | {"scale": 0.0})],
        "scale an integer": [group(good | {"scale": 2})],
        "scale text": [group(good | {"scale": "1.0"})],
        "scale beyond float32": [group(good | {"scale": 1e39})],
        "scale no float32": [group(good | {"scale": 0.1})],
        "seed without its form": [group(good | {"seed": 1})],
        "seed negative": [group(good | {"seed": -1}, positions="seed")],
        "seed true": [group(good | {"seed": True}, positions="seed")],
        "seed 2^63": [group(good | {"seed": 2**63}, positions="seed")],
        "seed missing": [group(good, positions="seed")],
        "seed with stored positions too": [group(good | {"seed": 1}, positions="seed")],
        "a group without its tensors": [group(good), group(module("a", (4, 4), 1))],
        "no groups but tensors": [],
        "tiles of a wrong nnz": [group(good | {"tiles": 2}, kind="block", block_size=2)],
    }
    for label, rows in groups.items():
        yield Attack(f"layout: {label}", file(rows), INVALID)
    duplicated = '[{"kind": "element", "kind": "element"}]'
    yield Attack("layout: duplicate key in the groups", file(duplicated), INVALID)
    yield Attack("layout: version 2", file([group(good)], format="2"), INVALID)
    yield Attack("layout: unknown metadata", file([group(good)], surprise="1"), INVALID)
    yield Attack("layout: record a list", file([group(good)], record="[]"), INVALID)
    yield Attack("layout: record with NaN", file([group(good)], record='{"a":NaN}'), INVALID)
    yield Attack("layout: record too deep", file([group(good)], record="[" * 9000), INVALID)
    levels = '{"a":' * 64 + "[]" + "}" * 64
    yield Attack("layout: record of 65 levels", file([group(good)], record=levels), INVALID)
    extras = '[{"name": "model.norm.weight", "dtype": "F32", "shape": [8]}]'
    yield Attack("layout: extras", file([group(good)], extras=extras), "unsupported_module")
    for label, text in (("a number", "1"), ("of numbers", "[1]"), ("without a name", "[{}]")):
        yield Attack(f"layout: extras {label}", file([group(good)], extras=text), INVALID)
    # The second group has two modules, so its tensors would be called after group.1 as well.
    one = group(module("group.1", (4, 4), 2))
    two = group(module("a", (4, 4), 1), module("b", (4, 4), 1))
    named = [positions("group.1", [0, 1]), bf16("group.1", [ONE, ONE])]
    clash = container(metadata([one, two], target.fingerprint), named)
    yield Attack("layout: one name for the tensors of two groups", clash, INVALID)
    stray = container(metadata([group(good)], target.fingerprint), [*tensors, frame("x", b"1")])
    yield Attack("layout: a tensor of no group", stray, INVALID)


def bad_frames(target: Target) -> Iterator[Attack]:
    """Gap-coded positions and compressed values, broken in every layer."""
    prefix = f"{target.name}.positions"

    def file(high: list[bytes], *, low: bytes | None = None, shift: int = 0, nnz: int = 4) -> bytes:
        row = group(
            module(target.name, target.shape, nnz),
            positions="gaps",
            shift=shift,
            high_planes=len(high),
        )
        tensors = [frame(f"{prefix}.high{index}", data) for index, data in enumerate(high)]
        tensors += [] if low is None else [frame(f"{prefix}.low", low)]
        tensors.append(bf16(target.name, [ONE] * nnz))
        return container(metadata([row], target.fingerprint), tensors)

    good = squeezed(bytes(4))
    unsized = squeezed(bytes(4), content_size=False)
    damaged = bytearray(squeezed(bytes(range(4))))
    damaged[-5] ^= 0xFF
    # A frame of four stored bytes that asks for dictionary 7.
    keyed = b"\x28\xb5\x2f\xfd\x21\x07\x04\x21\0\0\0\0\0\0"
    skippable = struct.pack("<II", 0x184D2A50, 4) + bytes(4)
    bomb = squeezed(bytes(1 << 24))
    ones = squeezed(b"\xff" * 4)
    cases = {
        "empty": b"",
        "no frame": b"\xff" * 8,
        "cut short": good[:-1],
        "bytes after the frame": good + b"\0",
        "two frames": squeezed(bytes(2)) * 2,
        "a size not declared": unsized,
        "no checksum": squeezed(bytes(4), checksum=False),
        "another size declared": squeezed(bytes(5)),
        "16 MiB declared": bomb,
        "a dictionary": keyed,
        "a skippable frame": skippable,
        "damaged": bytes(damaged),
    }
    for label, data in cases.items():
        yield Attack(f"frame: {label}", file([data]), INVALID)
    with_low = file([good], low=squeezed(bytes(3)), shift=4)
    yield Attack("frame: low bits of another size", with_low, INVALID)
    missing_low = file([good], shift=4)
    yield Attack("frame: low bits missing", missing_low, INVALID)
    far = squeezed(b"\0\0\0\xff")
    beyond = file([good, good, far])
    yield Attack("frame: gaps that lead beyond the weight", beyond, INVALID, 3, weight=True)
    low = squeezed(b"\xff" * 8)
    huge = file([ones] * 5, low=low, shift=16)
    yield Attack("frame: gaps of 2^56", huge, INVALID, 0, weight=True)
    nnz = min(target.numel, 1024)
    wrap = squeezed(b"\xff" * nnz)
    low = squeezed(b"\xff" * 2 * nnz)
    wrapping = file([wrap] * 5, low=low, shift=16, nnz=nnz)
    yield Attack("frame: gaps whose sum wraps around", wrapping, INVALID, 0, weight=True)
    row = group(module(target.name, target.shape, 4), values="planes")
    planes = [frame(f"{target.name}.values.plane{index}", good) for index in range(2)]
    planes[1] = frame(f"{target.name}.values.plane1", bomb)
    tensors = [positions(target.name, [0, 1, 2, 3]), *planes]
    values = container(metadata([row], target.fingerprint), tensors)
    yield Attack("frame: a bomb among the values", values, INVALID)


def too_large(target: Target) -> Iterator[Attack]:
    """Declared sizes that must be refused before anything is decoded."""
    huge = module(target.name, (2**20, 2**20), 2**39, seed=1)
    row = group(huge, positions="seed", values="planes")
    tensors = [
        frame(f"{target.name}.values.plane{index}", squeezed(bytes(9))) for index in range(2)
    ]
    file = container(metadata([row], target.fingerprint), tensors)
    yield Attack("size: 2^39 positions from a seed", file, "adapter_too_large")
    row = group(huge | {"nnz": 2**24}, positions="seed", values="planes")
    file = container(metadata([row], target.fingerprint), tensors)
    yield Attack("size: 160 MiB out of a kilobyte", file, "adapter_too_large")


def wrong_base(target: Target) -> Iterator[Attack]:
    mismatch = "base_model_mismatch"
    good = target._replace(fingerprint="sha256:" + "ab" * 32)
    yield Attack("base: another fingerprint", good.raw([0, 1]), mismatch)
    rows, columns = target.shape
    transposed = target._replace(shape=(rows + 1, columns))
    yield Attack("base: another shape", transposed.raw([0, 1]), mismatch, weight=True)
    unnamed = target._replace(name="model.nowhere.weight", fingerprint="")
    yield Attack("base: unknown weights, no fingerprint", unnamed.raw([0, 1]), mismatch)


def bad_names(target: Target) -> Iterator[Attack]:
    """The base's fingerprint, and a name that is not among its weights."""
    for label, name in (
        ("a parent folder", "../../../etc/passwd"),
        ("absolute", "/etc/passwd"),
        ("percent-encoded", "%2e%2e%2fetc"),
        ("NUL", "a\0b"),
        ("a line break", "weight\nINFO all is well"),
        ("right to left", "\u202egnp.weight"),
        ("emoji", "🙂.weight"),
        ("4 KB", "w" * 4096),
        ("empty", ""),
        ("a norm", "model.norm.weight"),
    ):
        data = target._replace(name=name).raw([0, 1])
        yield Attack(f"name: {label}", data, "unsupported_module")
