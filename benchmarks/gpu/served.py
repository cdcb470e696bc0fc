"""An engine over a random model, and adapters for it."""

from __future__ import annotations

import gc
import hashlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import numpy as np
import torch

from benchmarks.gpu.bench import Bench
from benchmarks.gpu.deltas import STRENGTH, Kind, draw
from benchmarks.gpu.inside import Inside
from benchmarks.gpu.models import random_model, word_tokenizer
from benchmarks.roofline.models import Model, Weight
from gossamer.engine.client import Engine
from gossamer.engine.config import EngineConfig
from gossamer.kernels import PackedDelta, Piece, pack
from gossamer.store.delta import Delta, DeltaSet

#: Of the memory that is free once the model is there; the rest is the graphs' and the library's.
_SHARE, _MOST_BYTES, _TOY_BYTES = 0.8, 80 << 30, 16 << 20
#: Row variants of packed layers: neighbouring layers do not read the same.
_VARIANTS = 2
#: Most members of a mix: 256 adapters on 16 rows.
MEMBERS = 16

_DeltaOf = Callable[[Weight, int], PackedDelta]


def key_of(*words: object) -> str:
    """A digest, as adapters have."""
    return f"sha256:{hashlib.sha256(repr(words).encode()).hexdigest()}"


class Seeded:
    """A source that makes adapters from their seeds.

    Every layer of one gets the same positions and values, so that making it costs little beside
    packing it, which is what a server must do.
    """

    def __init__(self, model: Model, density: float) -> None:
        self._model = model
        self._density = density
        self._seeds: dict[str, int] = {}

    def register(self, seed: int) -> str:
        """The digest of the adapter of a seed."""
        key = key_of("seeded", self._model.name, self._density, seed)
        self._seeds[key] = seed
        return key

    def __call__(self, key: str) -> DeltaSet:
        """The adapter. Raises `KeyError` for a digest that `register` never returned."""
        generator = np.random.default_rng(self._seeds[key])
        deltas = {}
        for weight, names in zip(self._model.weights, _NAMES, strict=True):
            for rows, name in zip(weight.projections, names, strict=True):
                positions = draw(generator, rows * weight.columns, self._density)
                values = STRENGTH * generator.standard_normal(positions.size, np.float32)
                delta = Delta.element((rows, weight.columns), positions, values)
                for layer in range(self._model.layers):
                    deltas[f"model.layers.{layer}.{name}.weight"] = delta
        return DeltaSet("random", self._model.name, deltas)


#: As the base's files name the projections of `Model.weights`.
_NAMES = (
    ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    ("self_attn.o_proj",),
    ("mlp.gate_proj", "mlp.up_proj"),
    ("mlp.down_proj",),
)


@contextmanager
def engine_of(
    bench: Bench, model: Model, *, int8: bool = False, source: Seeded | None = None,
    memory_bytes: int | None = None, max_rows: int | None = None,
) -> Iterator[Engine]:  # fmt: skip
    """An engine that has not been started; closed at the end."""
    setting = bench.setting
    gc.collect()  # an engine before this one is a cycle, with its block of memory
    made = random_model(model, setting.device, setting.dtype)
    if memory_bytes is None:
        memory_bytes = _TOY_BYTES
        if setting.device.type == "cuda":
            torch.cuda.empty_cache()
            free, _ = torch.cuda.mem_get_info(setting.device)
            memory_bytes = min(int(_SHARE * free), _MOST_BYTES)
    config = EngineConfig(
        max_rows=max_rows or max(setting.rows),
        memory_bytes=memory_bytes,
        max_members=MEMBERS,
        loader_threads=2,
        queue_timeout=600.0,
        prefix_sharing=False,
        fuse=False,
        kernels="triton",
        int8_adapters=int8,
        host_bytes=1 << 50,  # counts the same packed adapter once for each of its keys
    )
    engine = Engine(
        made, word_tokenizer(model.vocabulary), source or Seeded(model, 0.001), config,
        fingerprint="random",
    )  # fmt: skip
    try:
        yield engine
    finally:
        engine.close()


def adapter(bench: Bench, inside: Inside, model: Model, kind: Kind) -> dict[str, PackedDelta]:
    """By patched weight, for all layers: a few packed layers again and again."""
    return _for_all(inside, model, lambda weight, i: bench.deltas.host(weight, kind, i % _VARIANTS))


def one_entry(inside: Inside, model: Model, kind: Kind) -> dict[str, PackedDelta]:
    """The same with one entry in every weight: all launches, and nothing to do."""
    made = {}
    for weight in model.weights:
        piece = Piece("element", 0, 0, weight.projections[0], 1, torch.zeros(1, dtype=torch.int64),
                      torch.full((1,), STRENGTH))  # fmt: skip
        shape = (weight.rows, weight.columns)
        made[weight.name] = pack([piece], shape, len(weight.projections), "triton", kind.coding)
    return _for_all(inside, model, lambda weight, _: made[weight.name])


def _for_all(inside: Inside, model: Model, delta_of: _DeltaOf) -> dict[str, PackedDelta]:
    by_shape: Mapping[tuple[tuple[int, ...], int], Weight] = {
        (weight.projections, weight.columns): weight for weight in model.weights
    }
    return {
        name: delta_of(by_shape[shape], i // len(model.weights))
        for i, (name, shape) in enumerate(inside.weights.items())
    }
