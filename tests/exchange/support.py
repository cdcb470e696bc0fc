"""Bases, adapters and comparisons for the tests of the exchange."""

from __future__ import annotations

import io
import json
import math
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from transformers import AutoModelForCausalLM, PreTrainedModel

from gossamer.base.load import BaseFiles
from gossamer.base.weights import BaseNames
from gossamer.store.delta import Delta, DeltaSet, ValueDtype
from gossamer.store.errors import AdapterFileError, RefusalCode
from gossamer.store.exchange.base import BaseWeights
from gossamer.store.exchange.formats import Imported
from gossamer.store.exchange.tensors import DTYPES, open_tensors
from gossamer.store.format import open_validated, write
from tests.store_format.container import container

#: How far logits in float32 may lie from those of the other library.
TOLERANCE = 1e-5
#: For tests that use PEFT: it asks transformers for an attribute by its old name, and makes sparse
#: tensors without saying whether PyTorch is to check them.
USES_PEFT = pytest.mark.filterwarnings(
    "ignore:.is_gradient_checkpointing. is deprecated:FutureWarning",
    "ignore:Sparse invariant checks are implicitly disabled:UserWarning",
)
FINGERPRINT = "sha256:" + "5a" * 32
TOKENS = torch.arange(3, 51).view(2, 24) * 5 % 320


@dataclass(frozen=True)
class TinyBase:
    """The weights of a tiny model, by its own names; without a folder, names and shapes only."""

    name: str
    fingerprint: str
    table: Mapping[str, tuple[int, int]]
    parameters: Mapping[str, tuple[int, ...]]
    folder: Path | None = None
    aliases: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def at(cls, folder: Path) -> TinyBase:
        """Of a Hugging Face directory."""
        model = load(folder)
        names = BaseNames.of_model(BaseFiles("tiny", folder, FINGERPRINT), model)
        return cls("tiny", FINGERPRINT, names.table, names.parameters, folder, names.aliases)

    def read(self, name: str) -> tuple[NDArray[Any], ValueDtype]:
        if self.folder is None:
            raise AdapterFileError("unsupported_module", f"{name} is not at hand", tensor=name)
        with open_tensors(self.folder / "model.safetensors") as tensors:
            return tensors.read_values(name)

    def names_only(self) -> TinyBase:
        """The same without its files, as a server has it."""
        return replace(self, folder=None)


def shapes_only(shapes: Mapping[str, tuple[int, int]], folder: Path | None = None) -> TinyBase:
    """A base of these linear weights, and a norm and an embedding as any model has them."""
    hidden = max(shape[1] for shape in shapes.values())
    others = {"model.embed_tokens.weight": (32, hidden), "model.norm.weight": (hidden,)}
    return TinyBase("shapes", FINGERPRINT, dict(shapes), {**others, **shapes}, folder)


def load(folder: Path, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """transformers' model of a directory, in eval mode, without gradients."""
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
        folder, dtype=dtype, attn_implementation="eager", local_files_only=True
    )
    model.requires_grad_(requires_grad=False).eval()
    return model


def random_set(
    base: BaseWeights,
    names: Sequence[str] | None = None,
    *,
    density: float = 0.1,
    sigma: float = 0.05,
    seed: int = 0,
    block_size: int | None = None,
) -> DeltaSet:
    """Random float32 deltas on `names` (all linear weights), large enough to be seen in logits."""
    generator = np.random.default_rng(seed)
    deltas: dict[str, Delta] = {}
    for name in base.table if names is None else names:
        shape = base.table[name]
        size = block_size or 1
        tiles = tuple(-(-side // size) for side in shape)
        where = np.flatnonzero(generator.random(math.prod(tiles)) < density)
        if block_size is None:
            values = generator.normal(0, sigma, where.size).astype(np.float32)
            deltas[name] = Delta.element(shape, where, values)
        else:
            values = generator.normal(0, sigma, (where.size, size, size)).astype(np.float32)
            deltas[name] = Delta.block(shape, size, where, values)
    return DeltaSet(base.fingerprint, base.name, deltas)


def changed(
    folder: Path, deltas: Mapping[str, Delta], dtype: torch.dtype = torch.float32
) -> PreTrainedModel:
    """The model of a directory in `dtype` with our deltas added: in float32, rounded once."""
    model = load(folder, dtype)
    for name, delta in deltas.items():
        weight = model.get_parameter(name)
        weight.copy_((weight.float() + torch.from_numpy(delta.dense())).to(dtype))
    return model


@torch.no_grad()
def logits(model: Any, tokens: torch.Tensor = TOKENS) -> torch.Tensor:
    """[batch, tokens, vocabulary], float32."""
    found: torch.Tensor = model(input_ids=tokens).logits
    return found.float()


def assert_same_logits(theirs: Any, folder: Path, deltas: Mapping[str, Delta]) -> None:
    """Their model's logits are those of the base with our deltas, and not those of the base."""
    expected, plain = logits(changed(folder, deltas)), logits(load(folder))
    found = logits(theirs)
    assert (expected - plain).abs().max() > 0.01, "the deltas change nothing: this shows nothing"
    assert (found - expected).abs().max() <= TOLERANCE


def assert_same_deltas(left: Mapping[str, Delta], right: Mapping[str, Delta]) -> None:
    """Both change the same weights at the same entries by the same float32 values, bit for bit."""
    assert sorted(left) == sorted(right)
    for name, delta in left.items():
        (positions, values), (others, found) = delta.elements(), right[name].elements()
        assert delta.shape == right[name].shape
        assert np.array_equal(positions, others), name
        assert np.array_equal(values.view(np.uint32), found.view(np.uint32)), name


def packed(imported: Imported, base: BaseWeights) -> DeltaSet:
    """What was imported, through our own file and its validator."""
    buffer = io.BytesIO()
    write(imported.delta_set, buffer)
    opened = open_validated(buffer.getvalue(), base.table)
    assert_same_deltas(imported.delta_set.deltas, opened.deltas)
    assert opened.record == imported.delta_set.record
    return opened


#: Name → what it holds: an array, or (dtype, shape, bytes) where numpy has no such array.
Tensors = Mapping[str, NDArray[Any] | tuple[str, Sequence[int], bytes]]
_NAMES = {np.dtype(dtype): name for name, dtype in DTYPES.items() if name[0] != "B"}
_NAMES |= {np.dtype("u1"): "U8", np.dtype("<u2"): "BF16"}


def tensor_file(tensors: Tensors, metadata: Mapping[str, str] | None = None) -> bytes:
    """A safetensors file written by hand: uint16 arrays are bfloat16."""
    rows = []
    for name, value in tensors.items():
        if isinstance(value, tuple):
            dtype, shape, data = value
        else:
            dtype, shape, data = _NAMES[value.dtype], value.shape, value.tobytes()
        rows.append((name, dtype, list(shape), data))
    return container(dict(metadata or {"format": "pt"}), rows)


def claiming(size: int) -> bytes:
    """A safetensors file of 8 bytes of data whose header claims `size`."""
    row = {"dtype": "F32", "shape": [size // 4], "data_offsets": [0, size]}
    header = json.dumps({"x": row}).encode()
    return struct.pack("<Q", len(header)) + header + bytes(8)


def folder_of(path: Path, files: Mapping[str, bytes | Mapping[str, Any]]) -> Path:
    """A folder with these files; a mapping is written as JSON."""
    path.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        (path / name).write_bytes(data)
    return path


@dataclass(frozen=True)
class Attack:
    """Files that must be refused with `code`, in an error that names `named` and that entry."""

    name: str
    files: Mapping[str, bytes | Mapping[str, Any]]
    code: RefusalCode
    named: str = ""
    entry: int | None = None

    def __str__(self) -> str:
        return self.name
