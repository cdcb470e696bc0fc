"""A Hugging Face checkpoint of the base with an adapter merged into it."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from functools import partial
from pathlib import Path
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from gossamer.store.delta import Delta, DeltaSet
from gossamer.store.errors import AdapterFileError, printable
from gossamer.store.exchange.adding import Absorption, added, check_base
from gossamer.store.exchange.base import BaseWeights, required_folder
from gossamer.store.exchange.files import Files
from gossamer.store.exchange.formats import Exported, ExportOptions, Format
from gossamer.store.exchange.shards import (
    INDEX,
    SINGLE,
    Shards,
    Stored,
    loaded_names,
    prefixes_of,
)
from gossamer.store.exchange.tensors import DTYPES
from gossamer.store.exchange.writing import Planned, write_json, write_tensors
from gossamer.store.values import (
    CARRIER,
    ValueDtype,
    from_carrier,
    infinity_bits,
    magnitude_bits,
    to_carrier,
)

_CONFIG = "config.json"
#: What makes the files of weights a model that people can talk to, and what they may do with it.
_BESIDE = (
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "*.model",
    "*.tiktoken",
    "chat_template*",
    "generation_config.json",
    "LICENSE*",
    "NOTICE*",
    "USE_POLICY*",
)
_TORCH_NAMES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}


@dataclass(frozen=True)
class _Merge:
    """What the tensors of one merge have in common."""

    shards: Shards
    value_dtype: ValueDtype | None
    absorption: Absorption

    def planned(self, stored: Stored, name: str | None, delta: Delta | None) -> Planned:
        """A tensor of the base, `name` its own, with its delta where it has one."""
        floats = stored.dtype in CARRIER
        target = self.value_dtype if floats and self.value_dtype else stored.dtype
        if delta is not None and not floats:
            raise AdapterFileError(
                "unsupported_module",
                f"the base stores {printable(stored.name)} as {stored.dtype}",
                tensor=name,
            )
        make = partial(self._make, stored, target, name, delta)
        return Planned(stored.name, target, stored.shape, make)

    def _make(
        self, stored: Stored, target: str, name: str | None, delta: Delta | None
    ) -> NDArray[Any]:
        if stored.dtype not in CARRIER:
            return self.shards.read(stored)
        own, dtype = self.shards.read_values(stored)
        wanted = cast(ValueDtype, target)
        made = own if dtype == wanted else to_carrier(from_carrier(own, dtype), wanted)
        if delta is not None and name is not None:
            positions, difference = delta.elements()
            sums, same = added(name, own.reshape(-1)[positions], dtype, difference, wanted)
            self.absorption.count(name, difference, same)
            made = np.array(made)
            made.reshape(-1)[positions] = sums
        if dtype != wanted:
            _check_rounded(stored.name, own, dtype, made, wanted)
        return made


def _check_rounded(
    name: str, own: NDArray[Any], dtype: ValueDtype, made: NDArray[Any], target: ValueDtype
) -> None:
    """Whether what is finite in the base still is.

    Raises:
        AdapterFileError: a value is not.
    """
    where = np.flatnonzero(magnitude_bits(made, target) >= infinity_bits(target))
    before = from_carrier(own.reshape(-1)[where], dtype)
    lost = before[np.isfinite(before)]
    if lost.size:
        raise AdapterFileError(
            "unsupported_module",
            f"{printable(name)}: {lost[0]:g} of the base is not finite in {target}",
            tensor=name,
        )


def _write(
    delta_set: DeltaSet, base: BaseWeights, folder: Path, options: ExportOptions
) -> Exported:
    own = Files.at(required_folder(base))
    check_base(delta_set, base)
    shards = Shards.of(own)
    names = loaded_names(shards.tensors, base.parameters, prefixes_of(base.parameters))
    for name in delta_set.deltas.keys() - set(names.values()):
        message = f"the files of {base.name} hold no weight {printable(name)}"
        raise AdapterFileError("unsupported_module", message, tensor=name)
    merge = _Merge(shards, options.value_dtype, Absorption())
    plans = [
        merge.planned(stored, names.get(key), delta_set.deltas.get(names.get(key, "")))
        for key, stored in shards.tensors.items()
    ]
    weights = _write_shards(folder, plans, options.shard_bytes)
    dtypes = sorted({plan.dtype for plan in plans if plan.dtype in CARRIER})
    beside = _copy_beside(own, folder, dtypes)
    facts = {
        "nnz": delta_set.nnz,
        "bytes": sum(map(_bytes, plans)),
        "dtypes": dtypes,
        **merge.absorption.facts(),
    }
    return Exported((*weights, *beside), facts, merge.absorption.warnings("/".join(dtypes)))


def _bytes(plan: Planned) -> int:
    return int(np.prod(plan.shape, dtype=np.int64)) * DTYPES[plan.dtype].itemsize


def _write_shards(folder: Path, plans: Sequence[Planned], most: int) -> list[str]:
    """The files of weights, in the order of the plans; their names."""
    shards: list[list[Planned]] = [[]]
    size = 0
    for plan in plans:
        if shards[-1] and size + _bytes(plan) > most:
            shards.append([])
            size = 0
        shards[-1].append(plan)
        size += _bytes(plan)
    if len(shards) == 1:
        write_tensors(folder / SINGLE, plans)
        return [SINGLE]
    stem, _, end = SINGLE.rpartition(".")
    names = [f"{stem}-{n:05d}-of-{len(shards):05d}.{end}" for n in range(1, len(shards) + 1)]
    for name, shard in zip(names, shards, strict=True):
        write_tensors(folder / name, shard)
    places = {p.name: name for name, shard in zip(names, shards, strict=True) for p in shard}
    total = {"total_size": sum(map(_bytes, plans))}
    write_json(folder / INDEX, {"metadata": total, "weight_map": places})
    return [*names, INDEX]


def _copy_beside(own: Files, folder: Path, dtypes: Sequence[str]) -> list[str]:
    """The configuration with the dtype of the weights, the tokenizer, the licence; their names."""
    config = own.json(_CONFIG)
    if len(dtypes) == 1:
        for key in {"dtype", *({"torch_dtype"} & config.keys())}:
            config[key] = _TORCH_NAMES[dtypes[0]]
    write_json(folder / _CONFIG, config)
    names = [name for name in own.paths if any(fnmatch(name, like) for like in _BESIDE)]
    for name in names:
        shutil.copyfile(own.path(name), folder / name)
    return [_CONFIG, *names]


FORMAT = Format(
    "merged",
    "Hugging Face checkpoint with the adapter merged into it",
    "https://huggingface.co/docs/transformers/main_classes/model",
    exporter=_write,
)
