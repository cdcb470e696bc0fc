"""Hostile and broken adapters of peft-sparta, each with the code it must be refused with."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tests.exchange.peft_attacks import (
    FOREIGN,
    HUGE,
    INVALID,
    MISMATCH,
    MODULE,
    NAME,
    PICKLE,
    SHAPE,
)
from tests.exchange.support import Attack, Tensors, claiming, tensor_file

CONFIG, DELTAS = "config.json", "sparse_deltas.safetensors"
COUNT = 20
MODEL: Mapping[str, Any] = {"hidden_size": 10, "sparta_pretrained_model": "someone/else"}
INDICES, VALUES = f"indices.{NAME}", f"deltas.{NAME}"


def pair(name: str, indices: NDArray[Any], values: NDArray[Any]) -> dict[str, Any]:
    return {f"indices.{name}": indices, f"deltas.{name}": values}


def coordinates(dtype: str = "<i4") -> NDArray[Any]:
    """Of the first entries of the weight, [COUNT, 2]."""
    return np.stack(np.divmod(np.arange(COUNT), SHAPE[1]), axis=1).astype(dtype)


def good() -> dict[str, Any]:
    """One weight with entries, and what has none, as its own saving lists it."""
    found = pair(NAME, coordinates(), np.ones(COUNT, "<f4"))
    none = np.empty(0, "<f4")
    for name, dimensions in (
        ("model.layers.0.v.weight", 2),
        ("model.embed_tokens.weight", 2),
        ("model.norm.weight", 1),
    ):
        found |= pair(name, np.empty((0, dimensions), "<i4"), none)
    return found


def files(tensors: Tensors | None = None, **config: Any) -> dict[str, Any]:
    data = tensor_file(good() if tensors is None else tensors)
    return {CONFIG: {**MODEL, **config}, DELTAS: data}


def attacks() -> Iterator[Attack]:
    yield from bad_entries()
    yield from bad_arrays()
    yield from bad_sets()
    yield from bad_files()


def bad_entries() -> Iterator[Attack]:
    for label, row, column in (
        ("a row beyond the last", 12, 0),
        ("a row of minus one", -1, 0),
        ("a column of the next row", 0, 10),
        ("a column of the row before", 1, -1),
        ("a row before, of a column beyond", -1, 15),
        ("2^32 + 1", 2**32 + 1, 0),
        ("a row that wraps around", 2**63 // 5 + 1, 0),
        ("a row that wraps around to zero", 2**62, 0),
        ("2^63 - 1 and 2^63 - 1", 2**63 - 1, 2**63 - 1),
        ("-2^63", -(2**63), 0),
    ):
        where = coordinates("<i8")
        where[6] = row, column
        yield Attack(f"entries: {label}", files(good() | {INDICES: where}), INVALID, NAME, entry=6)
    where = coordinates()
    where[9] = where[2]
    doubled = files(good() | {INDICES: where})
    yield Attack("entries: one place twice", doubled, INVALID, NAME, entry=9)
    yield Attack(
        "entries: all in one place",
        files(good() | {INDICES: np.zeros((COUNT, 2), "<i4")}),
        INVALID,
        NAME,
        entry=1,
    )
    for label, bad in (("NaN", math.nan), ("infinite", -math.inf), ("too large", 65505.0)):
        values = np.ones(COUNT, "<f4")
        values[3] = bad
        # In falling order, so that the entry named is that of the file and not of the result.
        turned = good() | {INDICES: coordinates()[::-1].copy(), VALUES: values}
        yield Attack(f"entries: {label}", files(turned), INVALID, NAME, entry=3)


def bad_arrays() -> Iterator[Attack]:
    there = coordinates()
    every = np.stack(np.divmod(np.arange(121) % 120, 10), axis=1).astype("<i4")
    more = files(good() | pair(NAME, every, np.ones(121, "<f4")))
    yield Attack("arrays: more than all", more, INVALID, "121 entries")
    for label, indices, named in (
        ("one fewer", there[1:].copy(), NAME),
        ("turned", there.T.copy(), NAME),
        ("flat", np.arange(COUNT, dtype="<i4"), NAME),
        ("three dimensions", np.zeros((COUNT, 3), "<i4"), NAME),
        ("one dimension", np.zeros((COUNT, 1), "<i4"), NAME),
        ("no entries and a side of 2^60", ("I32", [0, HUGE], b""), NAME),
        ("2^60 entries of nothing", ("I32", [HUGE, 0], b""), NAME),
        ("float16", there.astype("<f2"), INDICES),
        ("not whole", there.astype("<f4") + 0.5, INDICES),
        ("NaN", there.astype("<f8") * math.nan, INDICES),
        ("U64", ("U64", [COUNT, 2], there.astype("<u8").tobytes()), INDICES),
    ):
        yield Attack(f"indices: {label}", files(good() | {INDICES: indices}), INVALID, named)
    for label, values, named in (
        ("one more", np.ones(COUNT + 1, "<f4"), NAME),
        ("none", np.ones(0, "<f4"), NAME),
        ("two dimensions", np.ones((COUNT, 1), "<f4"), NAME),
        ("no dimension", ("F32", [], bytes(4)), NAME),
        ("integers", np.ones(COUNT, "<i4"), VALUES),
        ("bytes", ("F8_E5M2", [COUNT], bytes(COUNT)), VALUES),
    ):
        yield Attack(f"values: {label}", files(good() | {VALUES: values}), INVALID, named)
    side = good() | {"indices.model.norm.weight": ("I32", [0, HUGE], b"")}
    yield Attack("indices: a norm's, of 2^60 dimensions", files(side), INVALID, "model.norm.weight")


def bad_sets() -> Iterator[Attack]:
    one = np.zeros((1, 2), "<i4")
    number = np.ones(1, "<f4")
    none, nothing = np.empty((0, 2), "<i4"), np.empty(0, "<f4")
    for key in (INDICES, VALUES, "deltas.model.norm.weight"):
        half = {name: value for name, value in good().items() if name != key}
        yield Attack(f"set: without {key}", files(half), INVALID, key)
    for label, name, code in (
        ("an embedding", "model.embed_tokens.weight", MODULE),
        ("an unknown weight", "model.layers.9.q.weight", MISMATCH),
        ("a classification head", "score.weight", MODULE),
        ("a path", "../../etc/passwd", MISMATCH),
        ("an empty name", "", MISMATCH),
    ):
        yield Attack(f"set: {label}", files(good() | pair(name, one, number)), code, name)
    norm = pair("model.norm.weight", np.zeros((1, 1), "<i4"), number)
    yield Attack("set: a norm", files(good() | norm), MODULE, "model.norm.weight")
    strange = files(good() | pair("model.layers.9.q.weight", none, nothing))
    yield Attack("set: an unknown weight without entries", strange, MISMATCH, "layers.9.q.weight")
    for key in ("indices", "x", "Indices.a", "original_chosen_params.a", ""):
        yield Attack(f"set: a tensor {key!r}", files(good() | {key: number}), INVALID, key)
    yield Attack("set: nothing", files({}), INVALID, DELTAS)


def bad_files() -> Iterator[Attack]:
    data = files()[DELTAS]
    for label, text in (
        ("not JSON", b"nothing"),
        ("a list", b"[1]"),
        ("a key twice", b'{"hidden_size": 10, "hidden_size": 10}'),
        ("infinite", b'{"hidden_size": Infinity}'),
    ):
        yield Attack(f"config: {label}", {CONFIG: text, DELTAS: data}, INVALID, CONFIG)
    large = {CONFIG: b" " * (1 << 20) + b"{}", DELTAS: data}
    yield Attack("config: 1 MiB", large, "adapter_too_large", CONFIG)
    for size in (11, 0, 10**4000):
        label = f"config: hidden_size {str(size)[:9]}"
        yield Attack(label, files(hidden_size=size), MISMATCH, "hidden_size")
    for name in (
        "head_init.safetensors",
        "head_init.pt",
        "new_embeddings_init.safetensors",
        "new_embeddings_init.pt",
    ):
        yield Attack(f"file: {name}", {**files(), name: b""}, MODULE, name)
    for label, content, code in (
        ("a pickle", PICKLE, FOREIGN),
        ("empty", b"", INVALID),
        ("cut short", data[:-1], INVALID),
        ("2^60 bytes claimed", claiming(HUGE), INVALID),
    ):
        yield Attack(f"file: {label}", {**files(), DELTAS: content}, code)
