"""Hostile and broken files of the formats that need the base's weights.

Each has the code that it must be refused with.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gossamer.store.errors import RefusalCode
from tests.exchange.support import Attack, TinyBase, claiming, folder_of, shapes_only, tensor_file

#: The weight that the attacks aim at, and its shape.
NAME, SHAPE = "model.layers.0.q.weight", (12, 10)
OTHER = "model.layers.0.v.weight"
NORM, EMBEDDING = "model.norm.weight", "model.embed_tokens.weight"
INVALID: RefusalCode = "invalid_adapter_file"
MISMATCH: RefusalCode = "base_model_mismatch"
MODULE: RefusalCode = "unsupported_module"
FOREIGN: RefusalCode = "unsupported_file"
HUGE = 2**60
CONFIG, SINGLE, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
#: An empty dictionary, and what comes after.
PICKLE = b"\x80\x02}q\x00." + bytes(8)
LLAMA = {"model_type": "llama", "hidden_size": 10}


def make_base(folder: Path) -> TinyBase:
    """A base of two linear weights, a norm and an embedding, with its files."""
    base = shapes_only({NAME: SHAPE, OTHER: (6, 10)}, folder)
    folder_of(folder, {SINGLE: tensor_file(weights()), CONFIG: LLAMA})
    return base


def weights() -> dict[str, NDArray[Any]]:
    """The base's own."""
    generator = np.random.default_rng(0)
    shapes = {NAME: SHAPE, OTHER: (6, 10), NORM: (10,), EMBEDDING: (32, 10)}
    return {n: generator.normal(0, 1, shape).astype("<f4") for n, shape in shapes.items()}


# A checkpoint


def checkpoint(**changes: Any) -> dict[str, Any]:
    """Its files; `changes` are tensors instead of the base's, None: without."""
    tensors = {**weights(), NAME: weights()[NAME] + np.float32(0.5)}
    tensors |= {key.replace("__", "."): value for key, value in changes.items()}
    kept = {key: value for key, value in tensors.items() if value is not None}
    return {CONFIG: LLAMA, SINGLE: tensor_file(kept)}


def sharded(index: Any, **files: Any) -> dict[str, Any]:
    """The good checkpoint in two files, with this index."""
    tensors = {**weights(), NAME: weights()[NAME] + np.float32(0.5)}
    text = json.dumps(index).encode() if not isinstance(index, bytes) else index
    return {
        CONFIG: LLAMA,
        INDEX: text,
        "a.safetensors": tensor_file({NAME: tensors[NAME], OTHER: tensors[OTHER]}),
        "b.safetensors": tensor_file({NORM: tensors[NORM], EMBEDDING: tensors[EMBEDDING]}),
        **files,
    }


def index(**changes: Any) -> dict[str, Any]:
    places = {NAME: "a.safetensors", OTHER: "a.safetensors"}
    places |= {NORM: "b.safetensors", EMBEDDING: "b.safetensors"}
    return {"weight_map": {**places, **{k.replace("__", "."): v for k, v in changes.items()}}}


def changed(name: str, at: int, value: float) -> NDArray[Any]:
    found = weights()[name].copy()
    found.reshape(-1)[at] = value
    return found


def checkpoints() -> Iterator[Attack]:
    own = weights()
    yield from _safetensors(SINGLE, {CONFIG: LLAMA})
    for name, tensor, code in (
        ("another shape", own[NAME][:, :9].copy(), MISMATCH),
        ("turned", own[NAME].T.copy(), MISMATCH),
        ("flat", own[NAME].ravel(), MISMATCH),
        ("empty", own[NAME][:0], MISMATCH),
        ("a dimension of 2^60", ("F32", (HUGE, 0), b""), MISMATCH),
        ("missing", None, MISMATCH),
        ("integers", own[NAME].astype("<i4"), INVALID),
        ("bytes", own[NAME].astype("u1"), INVALID),
        ("eight bits", ("F8_E4M3", SHAPE, bytes(120)), INVALID),
        ("NaN", changed(NAME, 7, math.nan), INVALID),
        ("infinity", changed(NAME, 7, math.inf), INVALID),
        ("minus infinity", changed(NAME, 7, -math.inf), INVALID),
        ("1e38", changed(NAME, 7, 1e38), INVALID),
        ("too large a difference", changed(NAME, 7, 70000.0), INVALID),
        ("1e300 in float64", own[NAME].astype("<f8") * 1e300, INVALID),
    ):
        files = checkpoint(**{NAME: tensor})
        yield Attack(f"the weight: {name}", files, code, NAME)
    for name, tensor in (
        ("one element", changed(NORM, 3, 5.0)),
        ("NaN", changed(NORM, 3, math.nan)),
        ("all", own[NORM] + 1),
    ):
        yield Attack(f"the norm: {name}", checkpoint(**{NORM: tensor}), MODULE, NORM)
    grown = np.concatenate([own[EMBEDDING], own[EMBEDDING][:1]])
    yield Attack("an added token", checkpoint(**{EMBEDDING: grown}), MODULE, "were added")
    shorter = checkpoint(**{EMBEDDING: own[EMBEDDING][:31].copy()})
    yield Attack("a token less", shorter, MISMATCH, EMBEDDING)
    yield Attack("another embedding", checkpoint(**{EMBEDDING: own[EMBEDDING] * 2}), MODULE, "320")
    for name in ("nowhere.weight", "model.layers.9.q.weight", "../../x", "a\0b", "\u202egnp", ""):
        files = checkpoint(**{name: np.ones((2, 2), "<f4")})
        yield Attack(f"an unknown tensor: {name!r}", files, MISMATCH, "is unknown here")
    twice = checkpoint(**{NAME.removeprefix("model."): own[NAME]})
    yield Attack("the weight twice, under two names", twice, INVALID, "the same weight")
    yield from _configs()
    yield from _indices()


def _configs() -> Iterator[Attack]:
    good = checkpoint()[SINGLE]
    for name, config, code, named in (
        ("another architecture", {"model_type": "gpt2"}, MISMATCH, "gpt2"),
        ("no architecture", {}, MISMATCH, "architecture"),
        ("an architecture that is a list", {"model_type": ["llama"]}, MISMATCH, "architecture"),
        ("quantized", {**LLAMA, "quantization_config": {"bits": 4}}, FOREIGN, "quantized"),
        ("no JSON", b"{", INVALID, CONFIG),
        ("a list", b"[]", INVALID, CONFIG),
        ("a key twice", b'{"a": 1, "a": 2}', INVALID, CONFIG),
        ("NaN", b'{"a": NaN}', INVALID, CONFIG),
        ("deep", b"[" * 100_000, INVALID, CONFIG),
        ("two megabytes", b"{" + b" " * (2 << 20) + b"}", "adapter_too_large", CONFIG),
    ):
        yield Attack(f"config: {name}", {CONFIG: config, SINGLE: good}, code, named)


def _indices() -> Iterator[Attack]:
    yield Attack("index: no weight_map", sharded({}), INVALID, "weight_map")
    yield Attack("index: a list for a weight_map", sharded({"weight_map": [1]}), INVALID)
    yield Attack("index: an empty weight_map", sharded({"weight_map": {}}), INVALID)
    yield Attack("index: no JSON", sharded(b"{"), INVALID, INDEX)
    twice = json.dumps(index()).replace('{"weight_map": {', '{"weight_map": {"x": "y", "x": "y", ')
    yield Attack("index: a key twice", sharded(twice.encode()), INVALID)
    for name, file in (
        ("a missing file", "c.safetensors"),
        ("a parent folder", "../model.safetensors"),
        ("an absolute path", "/etc/passwd.safetensors"),
        ("a pickle", "pytorch_model.bin"),
        ("a number", 7),
        ("nothing", ""),
        ("the configuration", CONFIG),
    ):
        yield Attack(f"index: {name}", sharded(index(**{NAME: file})), INVALID)
    yield Attack("index: another file", sharded(index(**{NAME: "b.safetensors"})), INVALID, NAME)
    ghost = sharded(index(ghost="a.safetensors"))
    yield Attack("index: a tensor that is nowhere", ghost, INVALID, "ghost")
    both = tensor_file({k: weights()[k] for k in (NORM, EMBEDDING, NAME)})
    files = sharded(index(), **{"b.safetensors": both})
    yield Attack("index: a tensor in two files", files, INVALID, NAME)
    files = sharded(index(), **{"b.safetensors": PICKLE})
    yield Attack("index: a file that is a pickle", files, FOREIGN)
    half = {name: file for name, file in index()["weight_map"].items() if file == "a.safetensors"}
    yield Attack("index: half of the files", sharded({"weight_map": half}), MISMATCH, NORM)


def _safetensors(name: str, beside: Mapping[str, Any]) -> Iterator[Attack]:
    """What is no safetensors file."""
    for label, data, code in (
        ("a pickle", PICKLE, FOREIGN),
        ("a zip archive", b"PK\x03\x04" + bytes(60), FOREIGN),
        ("nothing", b"", INVALID),
        ("zeros", bytes(64), INVALID),
        ("a header that claims 2^60", HUGE.to_bytes(8, "little") + b"{}", INVALID),
        ("a tensor that claims 2^60", claiming(HUGE), INVALID),
        ("cut", tensor_file(weights())[:-4], INVALID),
        ("longer than it says", tensor_file(weights()) + b"x", INVALID),
    ):
        yield Attack(f"{name}: {label}", {**beside, name: data}, code)


# A weight patch

PATCH = "patch.safetensors"


def patch(
    indices: Any, values: Any, name: str = NAME, ends: tuple[str, str] = (".indices", ".values"),
    more: Mapping[str, Any] | None = None, **metadata: str,
) -> dict[str, Any]:  # fmt: skip
    """A patch of one weight."""
    tensors = {name + ends[0]: indices, name + ends[1]: values, **(more or {})}
    kept = {key: value for key, value in tensors.items() if value is not None}
    return {PATCH: tensor_file(kept, {"format": "sparse_weight_patch", **metadata})}


def where(*positions: int, dtype: str = "<i4") -> NDArray[Any]:
    return np.array(positions, dtype)


def ones(count: int, dtype: str = "<f4") -> NDArray[Any]:
    return np.ones(count, dtype)


def patches() -> Iterator[Attack]:
    yield from _safetensors(PATCH, {})
    good = where(0, 5, 119)
    wide = "<i8"
    for name, indices, entry in (
        ("the size", where(0, 120), 1),
        ("minus one", where(0, -1), 1),
        ("2^63 - 1", where(0, 2**63 - 1, dtype=wide), 1),
        ("-2^63", where(-(2**63), 0, dtype=wide), 0),
        ("2^32 + 1, which a cast to 32 bits would accept", where(0, 2**32 + 1, dtype=wide), 1),
        ("one twice", where(7, 7), 1),
        ("one twice, not in a row", where(7, 3, 7), 2),
    ):
        files = patch(indices, ones(indices.size))
        yield Attack(f"positions: {name}", files, INVALID, NAME, entry)
    for name, value in (("NaN", math.nan), ("infinity", math.inf), ("1e38", 1e38)):
        values = ones(3)
        values[1] = value
        yield Attack(f"values: {name}", patch(good, values), INVALID, NAME, 1)
    rows: tuple[tuple[str, Any, Any], ...] = (
        ("float positions", good.astype("<f2"), ones(3)),
        ("half a position", np.array([0.5, 1, 2], "<f4"), ones(3)),
        ("positions beyond 2^24 in float32", np.array([0, 1, 2**25], "<f4"), ones(3)),
        ("truth values", ("BOOL", [3], b"\1\0\1"), ones(3)),
        ("integers for values", good, where(1, 2, 3)),
        ("eight bits for values", good, ("F8_E4M3", [3], bytes(3))),
        ("fewer values", good, ones(2)),
        ("more values", good, ones(4)),
        ("two dimensions", good.reshape(3, 1), ones(3).reshape(3, 1)),
        ("a number", where(0).reshape(()), ones(1).reshape(())),
        ("no values", good, None),
        ("no positions", None, ones(3)),
        ("2^60 of nothing", ("I32", [HUGE, 0], b""), ("F32", [HUGE, 0], b"")),
    )
    for name, there, found in rows:
        yield Attack(name, patch(there, found), INVALID, NAME)
    for name in ("nowhere.weight", "../../etc/passwd", "a\nb", "\u202egnp", ""):
        files = patch(good, ones(3), name)
        yield Attack(f"an unknown weight: {name!r}", files, MISMATCH, "is unknown here")
    empty = patch(where(), ones(0), "nowhere.weight")
    yield Attack("an unknown weight without entries", empty, MISMATCH, "nowhere.weight")
    for name in (NORM, EMBEDDING):
        yield Attack(f"an entry of {name}", patch(where(0), ones(1), name), MODULE, name)
    stray = patch(good, ones(3), more={"stray": ones(1)})
    yield Attack("a tensor that belongs to nothing", stray, INVALID, "stray")
    both = {NAME + ".idx": good, NAME + ".val": ones(3)}
    yield Attack("both layouts", patch(good, ones(3), more=both), INVALID, NAME)
    short = {OTHER + ".idx": good, OTHER + ".val": ones(3)}
    yield Attack("one in each layout", patch(good, ones(3), more=short), INVALID, "another layout")
    long = patch(good, ones(3), encoding="gap_delta")
    yield Attack("gaps where positions are called indices", long, FOREIGN, "gap_delta")
    yield from _patch_metadata(good)
    yield from _gaps()


def _patch_metadata(good: NDArray[Any]) -> Iterator[Attack]:
    short = (".idx", ".val")
    rows: tuple[tuple[str, dict[str, Any], RefusalCode], ...] = (
        ("an anchor", {"sparse": "False"}, FOREIGN),
        ("an anchor of the first code", {"format": "anchor_checkpoint"}, FOREIGN),
        ("compressed by a card", {"encoding": "nvcomp_cascaded"}, FOREIGN),
        ("an unknown encoding", {"encoding": "\u202egnp"}, FOREIGN),
        ("no JSON", {"changed_params": "["}, INVALID),
        ("no list", {"changed_params": "{}"}, INVALID),
        ("no names", {"changed_params": "[1]"}, INVALID),
        ("a name too many", {"changed_params": json.dumps([NAME, OTHER])}, INVALID),
        ("a name too few", {"changed_params": "[]"}, INVALID),
        ("deep", {"changed_params": "[" * 50_000}, INVALID),
    )
    for name, metadata, code in rows:
        files = patch(good, ones(3), ends=short, **metadata)
        yield Attack(f"metadata: {name}", files, code)


def _gaps() -> Iterator[Attack]:
    """Positions as the gaps between them."""
    for name, gaps, entry in (
        ("beyond the end", where(60, 60, dtype="<u4"), 1),
        ("at once", where(120, 0, dtype="<u4"), 0),
        ("2^32 - 1 many times", np.full(8, 2**32 - 1, "<u4"), 0),
        ("negative", where(5, -3), 1),
        ("2^63 - 1", where(2**63 - 1, 2**63 - 1, dtype="<i8"), 0),
    ):
        files = patch(gaps, ones(gaps.size), ends=(".idx", ".val"), encoding="gap_delta")
        yield Attack(f"gaps: {name}", files, INVALID, NAME, entry)


def attacks() -> dict[str, list[Attack]]:
    """Format → its attacks."""
    return {"checkpoint": list(checkpoints()), "weight-patch": list(patches())}


def good_files() -> dict[str, dict[str, Any]]:
    """Format → files that must be read: as the attacks' are, but for what is wrong with those."""
    return {
        "checkpoint": checkpoint(),
        "weight-patch": patch(where(0, 5, 119), ones(3), model_version="1"),
    }
