"""Hostile and broken files of the formats that are pickles: what they hold, not how they run.

Each has the code that it must be refused with.
"""

from __future__ import annotations

import io
import math
from collections.abc import Iterator
from typing import Any

import torch

from tests.exchange.support import Attack, tensor_file
from tests.exchange.weights_attacks import (
    EMBEDDING,
    FOREIGN,
    HUGE,
    INVALID,
    MISMATCH,
    MODULE,
    NAME,
    NORM,
    PICKLE,
    SHAPE,
    weights,
)

SFT, SPARTA = "pytorch_diff.bin", "sparse_deltas.pt"


def saved(content: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(content, buffer)
    return buffer.getvalue()


def encoded(**changes: Any) -> dict[str, Any]:
    """A difference of composable-sft."""
    good = {"size": torch.Size(SHAPE), "index_steps": [0, 13, 1], "values": torch.ones(3)}
    return {key: value for key, value in {**good, **changes}.items() if value is not None}


def body(difference: Any, name: str = NAME, **more: Any) -> dict[str, Any]:
    return {SFT: saved({"body": {name: difference}, **more})}


def sfts() -> Iterator[Attack]:
    yield from _pickles(SFT)
    for name, content in (
        ("no body", {"head": None}),
        ("a list for a body", {"body": []}),
        ("numbers for names", {"body": {1: encoded()}}),
        ("an empty body", {"body": {}}),
        ("more than a body", {"body": {NAME: encoded()}, "feet": 1}),
        ("an empty dict of diffs", {"diffs": {}, "abs": {}}),
        ("diffs and a body", {"diffs": {NAME: encoded()}, "body": {}}),
        ("diffs and a head", {"diffs": {NAME: encoded()}, "head": None}),
        ("whole parameters alone", {"abs": {}}),
    ):
        yield Attack(name, {SFT: saved(content)}, INVALID)
    head = {"score.weight": torch.ones(2, 10)}
    yield Attack("a head", body(encoded(), head=head), MODULE, "head")
    whole = {SFT: saved({"diffs": {NAME: encoded()}, "abs": head})}
    yield Attack("whole parameters", whole, MODULE, "abs")
    beyond = [0, 119, 1]
    for name, changes in (
        ("no size", {"size": None}),
        ("a list for a size", {"size": [12, 10]}),
        ("a float in the size", {"size": (12.0, 10)}),
        ("a truth value in the size", {"size": (12, True)}),
        ("a size of ten thousand sides", {"size": (12, 10, *[1] * 9998)}),
        ("a side of 600 digits", {"size": (10**600, 10)}),
        ("no steps", {"index_steps": None}),
        ("floats for steps", {"index_steps": [0.5, 1, 2]}),
        ("truth values for steps", {"index_steps": [True, True, True]}),
        ("a step of 2^80", {"index_steps": [0, 2**80, 1]}),
        ("steps that are text", {"index_steps": "0 13 1"}),
        ("a tensor of floats for steps", {"index_steps": torch.ones(3)}),
        ("steps in two dimensions", {"index_steps": torch.ones(3, 1, dtype=torch.int32)}),
        ("fewer steps", {"index_steps": [0, 1]}),
        ("more steps", {"index_steps": [0, 1, 1, 1]}),
        ("a negative step", {"index_steps": [5, -3, 1]}),
        ("a step beyond the end", {"index_steps": [0, 120, 1]}),
        ("steps of 2^62", {"index_steps": [0, 2**62, 2**62]}),
        ("the sum beyond the end", {"index_steps": beyond}),
        ("no values", {"values": None}),
        ("a list for values", {"values": [1.0, 1.0, 1.0]}),
        ("integers for values", {"values": torch.ones(3, dtype=torch.int64)}),
        ("values in two dimensions", {"values": torch.ones(3, 1)}),
        ("NaN", {"values": torch.tensor([1.0, math.nan, 1.0])}),
        ("infinity", {"values": torch.tensor([1.0, math.inf, 1.0])}),
        ("1e300", {"values": torch.tensor([1.0, 1e300, 1.0], dtype=torch.float64)}),
        ("more than a difference", {"scale": 2.0}),
    ):
        yield Attack(f"difference: {name}", body(encoded(**changes)), INVALID, NAME)
    yield Attack("a number for a difference", body(3), INVALID, NAME)
    yield Attack("a dense tensor for a difference", body(torch.ones(SHAPE)), INVALID, NAME)
    for name, size in (("turned", (10, 12)), ("flat", (120,)), ("2^60 by 2^60", (HUGE, HUGE))):
        yield Attack(f"size: {name}", body(encoded(size=size)), MISMATCH, NAME)
    sparse = torch.ones(10, 12).to_sparse()
    yield Attack("a sparse tensor of another shape", body(sparse), MISMATCH, NAME)
    yield Attack("an unknown weight", body(encoded(), "nowhere.weight"), MISMATCH, "nowhere")
    empty = encoded(index_steps=[], values=torch.ones(0))
    yield Attack("an unknown weight without entries", body(empty, "no.weight"), MISMATCH, "no.w")
    norm = {"size": (10,), "index_steps": [3], "values": torch.ones(1)}
    yield Attack("a norm", body(norm, NORM), MODULE, NORM)
    bent = {"size": (32, 10), "index_steps": [3], "values": torch.ones(1)}
    yield Attack("an embedding", body(bent, EMBEDDING), MODULE, EMBEDDING)


def spartas() -> Iterator[Attack]:
    yield from _pickles(SPARTA)
    good = torch.tensor([[0, 0], [3, 4]], dtype=torch.int32)
    two = torch.ones(2)

    def pair(indices: Any, values: Any, name: str = NAME) -> dict[str, Any]:
        return {SPARTA: saved({"indices": {name: indices}, "deltas": {name: values}})}

    for name, content in (
        ("no deltas", {"indices": {}}),
        ("nothing in both", {"indices": {}, "deltas": {}}),
        ("a list of indices", {"indices": [], "deltas": {}}),
        ("one of a pair", {"indices": {NAME: good}, "deltas": {}}),
        ("more than both", {"indices": {}, "deltas": {}, "more": {}}),
    ):
        yield Attack(name, {SPARTA: saved(content)}, INVALID)
    for name, indices, values in (
        ("a list", [[0, 0]], two),
        ("turned", good.T.contiguous()[:, :1], two),
        ("one dimension", good[:, 0].clone(), two),
        ("three dimensions", torch.zeros(2, 3, dtype=torch.int32), two),
        ("fewer values", good, two[:1].clone()),
        ("values in two dimensions", good, torch.ones(2, 1)),
        ("floats for indices", good.float(), two),
        ("integers for values", good, torch.ones(2, dtype=torch.int32)),
        ("a row beyond the last", torch.tensor([[12, 0], [0, 0]]), two),
        ("a column beyond the last", torch.tensor([[0, 10], [0, 0]]), two),
        ("a negative row", torch.tensor([[-1, 0], [0, 0]]), two),
        ("2^62 rows", torch.tensor([[2**62, 0], [0, 0]]), two),
        ("one twice", torch.tensor([[1, 1], [1, 1]]), two),
        ("NaN", good, torch.tensor([1.0, math.nan])),
        ("infinity", good, torch.tensor([math.inf, 1.0])),
        ("70000", good, torch.tensor([70000.0, 1.0])),
    ):
        yield Attack(f"entries: {name}", pair(indices, values), INVALID, NAME)
    yield Attack("an unknown weight", pair(good, two, "nowhere.weight"), MISMATCH, "nowhere")
    yield Attack("a head", pair(good, two, "score.weight"), MODULE, "score.weight")
    yield Attack("an embedding", pair(good, two, EMBEDDING), MODULE, EMBEDDING)
    files = {**pair(good, two), "new_embeddings_init.pt": b"x"}
    yield Attack("new tokens", files, MODULE, "new_embeddings_init.pt")


def _pickles(name: str) -> Iterator[Attack]:
    """What is no file of `torch.save`, or holds something else than a dict."""
    yield Attack("a bare pickle", {name: PICKLE}, FOREIGN)
    yield Attack("a safetensors file", {name: tensor_file(weights())}, FOREIGN)
    yield Attack("nothing at all", {name: b""}, FOREIGN)
    yield Attack("a module", {name: saved(torch.nn.Linear(2, 2))}, FOREIGN)
    yield Attack("half", {name: saved({"body": {}})[:100]}, INVALID)
    yield Attack("a tensor", {name: saved(torch.ones(3))}, INVALID)
    yield Attack("a list", {name: saved([{}])}, INVALID)
    yield Attack("a number", {name: saved(3)}, INVALID)
    yield Attack("numbers for keys", {name: saved({1: {}})}, INVALID)


def attacks() -> dict[str, list[Attack]]:
    """Format → its attacks."""
    return {"composable-sft": list(sfts()), "sparta-pickle": list(spartas())}


def good_files() -> dict[str, dict[str, Any]]:
    """Format → files that must be read: as the attacks' are, but for what is wrong with those."""
    good = torch.tensor([[0, 0], [3, 4]], dtype=torch.int32)
    pair = {"indices": {NAME: good}, "deltas": {NAME: torch.ones(2)}}
    return {"composable-sft": body(encoded()), "sparta-pickle": {SPARTA: saved(pair)}}
