"""The fingerprint says which weights were loaded, and nothing else."""

from __future__ import annotations

import hashlib
import os
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import PreTrainedModel

from gossamer.base.errors import UnsupportedBaseError
from gossamer.base.fingerprint import CHUNK, StatCache, fingerprint
from tests.tiny import ARCHS, tiny_model

DIGEST = "ab" * 32


def by_definition(model: PreTrainedModel, tied: bool) -> str:
    """The definition once more, from the state dict, without chunks."""
    values = {
        name: tensor.to(torch.float32).numpy()
        for name, tensor in model.state_dict().items()
        if not (tied and name == "lm_head.weight")
    }
    text = b"gossamer base fingerprint 1\n"
    for name in sorted(values, key=str.encode):
        array = np.ascontiguousarray(values[name], dtype="<f4")
        text += struct.pack("<I", len(name)) + name.encode()
        text += struct.pack("<I", array.ndim) + struct.pack(f"<{array.ndim}Q", *array.shape)
        text += array.tobytes()
    return hashlib.sha256(text).hexdigest()


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("tied", [False, True])
def test_it_is_what_its_definition_says(arch: str, tied: bool) -> None:
    model = tiny_model(arch, tied=tied)
    assert fingerprint(model) == by_definition(model, tied)


def test_weights_larger_than_a_chunk_are_hashed_whole() -> None:
    model = tiny_model("llama", vocab_size=1_000)
    embedding = model.get_parameter("model.embed_tokens.weight")
    assert embedding.numel() > CHUNK
    assert embedding.numel() % CHUNK
    before = fingerprint(model)
    assert before == by_definition(model, tied=False)
    embedding.view(-1)[-1] += 1
    assert fingerprint(model) not in (before, "")


def test_it_does_not_depend_on_the_order_of_parameters() -> None:
    model = tiny_model("llama")
    before = fingerprint(model)
    modules: Any = model._modules
    modules["model"] = modules.pop("model")  # now behind lm_head
    assert next(iter(dict(model.named_parameters()))) == "lm_head.weight"
    assert fingerprint(model) == before


@pytest.mark.parametrize("name", ["lm_head.weight", "model.norm.weight"])
def test_one_changed_value_changes_it(name: str) -> None:
    model = tiny_model("llama")
    before = fingerprint(model)
    parameter = model.get_parameter(name).view(-1)
    kept = parameter[7].clone()
    parameter[7] = torch.nextafter(kept, torch.tensor(torch.inf))
    assert fingerprint(model) != before
    parameter[7] = kept
    assert fingerprint(model) == before


def test_tied_weights_count_once_and_are_another_model_than_equal_ones() -> None:
    tied, untied = tiny_model("llama", tied=True), tiny_model("llama", tied=False)
    assert tied.get_output_embeddings().weight is tied.get_input_embeddings().weight
    untied.load_state_dict(tied.state_dict())
    assert fingerprint(tied) != fingerprint(untied)


def test_a_wider_type_with_the_same_values_is_the_same_model() -> None:
    model = tiny_model("qwen2", vocab_size=1_000).bfloat16()
    digest = fingerprint(model)
    assert digest == by_definition(model, tied=False)
    assert fingerprint(model.float()) == digest
    assert fingerprint(tiny_model("qwen2", vocab_size=1_000)) != digest, "rounding must show"


def test_progress_ends_with_every_byte_counted() -> None:
    model = tiny_model("llama")
    seen: list[tuple[str, int, int]] = []
    fingerprint(model, lambda *event: seen.append(event))
    size = 4 * sum(parameter.numel() for parameter in model.parameters())
    assert seen[-1] == ("fingerprint", size, size)


def test_parameters_without_plain_values_are_refused() -> None:
    wide = tiny_model("llama")
    wide.lm_head.to(torch.float64)
    with pytest.raises(UnsupportedBaseError, match=r"lm_head\.weight has dtype torch\.float64"):
        fingerprint(wide)
    with pytest.raises(UnsupportedBaseError, match=r"lm_head\.weight has no values"):
        fingerprint(tiny_model("llama").to_empty(device="meta"))


@pytest.fixture
def subject(tmp_path: Path) -> Path:
    (tmp_path / "model").mkdir()
    for name in ("a", "b"):
        (tmp_path / "model" / name).write_text(name)
    return tmp_path / "model"


def test_a_digest_is_remembered_until_a_file_changes(subject: Path, tmp_path: Path) -> None:
    files = [subject / "a", subject / "b"]
    cache = StatCache(tmp_path / "cache")
    assert cache.get(subject, files) is None
    cache.put(subject, files, DIGEST)
    assert StatCache(tmp_path / "cache").get(subject, reversed(files)) == DIGEST
    assert cache.get(subject, files[:1]) is None, "another set of files"
    assert cache.get(tmp_path, files) is None, "another subject"
    stat = files[0].stat()
    os.utime(files[0], ns=(stat.st_atime_ns, stat.st_mtime_ns + 1))
    assert cache.get(subject, files) is None, "another time"
    os.utime(files[0], ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert cache.get(subject, files) == DIGEST
    files[0].write_text("longer")
    os.utime(files[0], ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert cache.get(subject, files) is None, "another size"


@pytest.mark.parametrize(
    "text",
    [
        b"",
        b"{",
        b"[]",
        b"null",
        b"\xff\xfe",
        b'{"files": []}',
        b'{"files": [], "digest": 7}',
        b'{"files": [], "digest": "short"}',
        b'{"files": [], "digest": "' + b"zz" * 32 + b'"}',
    ],
)
def test_a_corrupt_record_counts_as_absent(text: bytes, subject: Path, tmp_path: Path) -> None:
    cache = StatCache(tmp_path / "cache")
    cache.put(subject, [], DIGEST)
    assert cache.get(subject, []) == DIGEST
    (record,) = (tmp_path / "cache").iterdir()
    record.write_bytes(text)
    assert cache.get(subject, []) is None
    cache.put(subject, [], DIGEST)
    assert cache.get(subject, []) == DIGEST
