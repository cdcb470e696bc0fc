"""PEFT's Supertuning: values for the weights of the largest (or smallest) magnitude.

A file may leave the positions out (`save_precomputed_indices=False`); PEFT then finds them again in
the base with `torch.topk`, whose order among equal magnitudes is not defined. So do we, and refuse
what hangs on that order.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gossamer.store.delta import Delta
from gossamer.store.errors import AdapterFileError, printable
from gossamer.store.exchange.base import BaseWeights
from gossamer.store.exchange.building import element_delta
from gossamer.store.exchange.files import Files
from gossamer.store.exchange.formats import Format, Imported, Importer, ImportOptions
from gossamer.store.exchange.names import check_names
from gossamer.store.exchange.peft_files import (
    CONFIG,
    by_weight,
    count_of,
    open_weights,
    part_of,
    peft_type,
    read_config,
)
from gossamer.store.exchange.peft_flat import flat_delta
from gossamer.store.exchange.records import imported, made_for, recorded, sum_warnings
from gossamer.store.exchange.tensors import TensorFile
from gossamer.store.format.container import invalid
from gossamer.store.values import bits, magnitude_bits

_NAME, _METHOD = "peft-supertuning", "SUPERTUNING"
_PATTERN = re.compile(r"(?P<module>.+)\.supertuning_(?P<part>indices|values)", re.DOTALL)
_KEYS = ("sparsity", "select_top", "peft_version")
_SAVE_INDICES = "save the adapter with save_precomputed_indices=True"


def _detect(files: Files) -> bool:
    return peft_type(files) == _METHOD


def _read(files: Files, base: BaseWeights, options: ImportOptions) -> Imported:
    config = read_config(files, _METHOD)
    sparsity, select_top = _selection(config)
    base_name = made_for(config, "base_model_name_or_path")
    deltas: dict[str, Delta] = {}
    summed = 0
    with open_weights(files) as tensors:
        weights = by_weight(base, tensors, _PATTERN)
        check_names(base, dict.fromkeys(weights), base_name)
        for name, parts in weights.items():
            _check_count(base, name, count_of(tensors, part_of(parts, "values", name)), sparsity)
        found_again = _without_indices(config, weights)
        for name, parts in weights.items():
            if found_again:
                deltas[name] = _delta_of_largest(tensors, name, parts, base, select_top, options)
            else:
                deltas[name], doubled = flat_delta(tensors, name, parts, base.table[name], options)
                summed += doubled
    return imported(
        _NAME,
        base,
        base_name,
        deltas,
        record=recorded(config, _KEYS),
        facts={"positions_from_base": found_again, "duplicates_summed": summed},
        warnings=sum_warnings(summed),
        fingerprint=base.fingerprint if found_again else "",
    )


def _selection(config: Mapping[str, Any]) -> tuple[float, bool]:
    """Sparsity, and whether the largest were taken.

    Raises:
        AdapterFileError: no such values; `unsupported_module` for Supra, which has a LoRA too.
    """
    if config.get("r") is not None:
        message = f"r in {CONFIG}: Supra adds a LoRA, which is not sparse"
        raise AdapterFileError("unsupported_module", message)
    sparsity: Any = config.get("sparsity")
    select_top = config.get("select_top", True)
    if type(sparsity) not in (int, float) or not 0 <= sparsity < 1:
        invalid(f"sparsity in {CONFIG} must be a number in [0, 1)")
    if not isinstance(select_top, bool):
        invalid(f"select_top in {CONFIG} must be true or false")
    return float(sparsity), select_top


def _check_count(base: BaseWeights, name: str, count: int, sparsity: float) -> None:
    """All that a file says about a weight's shape: PEFT loads no other number of values."""
    rows, columns = base.table[name]
    wanted = int(rows * columns * (1 - sparsity))  # as PEFT computes it, in float64
    if count != wanted:
        raise AdapterFileError(
            "base_model_mismatch",
            f"{printable(name)} has {count} values; a sparsity of {sparsity} makes {wanted} of a "
            f"weight of the base {base.name}",
            tensor=name,
        )


def _without_indices(config: Mapping[str, Any], weights: Mapping[str, Mapping[str, str]]) -> bool:
    """Whether the file leaves the positions out, as its configuration says."""
    if any("indices" in parts for parts in weights.values()):
        return False  # one that lacks them all the same is refused where it is read
    if config.get("save_precomputed_indices", True) is not False:
        invalid(f"no weight has supertuning_indices, and {CONFIG} does not say so")
    return True


def _delta_of_largest(
    tensors: TensorFile,
    name: str,
    parts: Mapping[str, str],
    base: BaseWeights,
    select_top: bool,
    options: ImportOptions,
) -> Delta:
    values, dtype = tensors.read_values(parts["values"])
    weight, stored = base.read(name)
    magnitudes = magnitude_bits(weight, stored).reshape(-1)
    positions = _selected(name, magnitudes, values.size, select_top)
    ranked = magnitudes[positions]
    tied = (ranked[1:] == ranked[:-1]) & (bits(values, dtype)[1:] != bits(values, dtype)[:-1])
    if tied.any():
        _refuse_tie(name, "decide which value is whose")
    return element_delta(
        name, base.table[name], positions, values, dtype, rounded_to=options.value_dtype
    )


def _selected(
    name: str, magnitudes: NDArray[Any], count: int, select_top: bool
) -> NDArray[np.int64]:
    """Positions of the `count` largest (or smallest), in the order of `torch.topk`: they first.

    Args:
        magnitudes: [elements] unsigned integers that order as the magnitudes do.

    Raises:
        AdapterFileError: equal magnitudes lie on both sides of the cut.
    """
    if count == 0:
        return np.empty(0, np.int64)
    keys = ~magnitudes if select_top else magnitudes
    cut = np.partition(keys, count - 1)[count - 1]
    chosen = np.flatnonzero(keys <= cut)
    if chosen.size != count:
        _refuse_tie(name, "decide which of them are chosen")
    return chosen[np.argsort(keys[chosen], kind="stable")].astype(np.int64)


def _refuse_tie(name: str, why: str) -> None:
    raise AdapterFileError(
        "invalid_adapter_file",
        f"{printable(name)}: the file leaves the positions out, and equal magnitudes in the base "
        f"would have to {why}; {_SAVE_INDICES}",
        tensor=name,
    )


FORMAT = Format(
    _NAME,
    "PEFT Supertuning (Super, without LoRA)",
    "https://github.com/huggingface/peft/tree/main/src/peft/tuners/supertuning",
    importer=Importer(_detect, _read),
)
