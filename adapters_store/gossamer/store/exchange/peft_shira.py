"""PEFT's SHiRA: coordinates and values of each linear layer, as many as a LoRA of rank r has."""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gossamer.store.delta import Delta, DeltaSet
from gossamer.store.errors import AdapterFileError, printable
from gossamer.store.exchange.adding import check_base
from gossamer.store.exchange.base import BaseWeights
from gossamer.store.exchange.building import check_count, element_delta, row_major
from gossamer.store.exchange.files import Files
from gossamer.store.exchange.formats import (
    Exported,
    ExportOptions,
    Format,
    Imported,
    Importer,
    ImportOptions,
)
from gossamer.store.exchange.names import PEFT_PREFIX, check_names
from gossamer.store.exchange.peft_files import (
    CONFIG,
    WEIGHTS,
    by_weight,
    count_of,
    open_weights,
    part_of,
    peft_type,
    read_config,
)
from gossamer.store.exchange.records import imported, made_for, recorded, sum_warnings
from gossamer.store.exchange.tensors import TensorFile
from gossamer.store.exchange.writing import Planned, path_warnings, write_json, write_tensors
from gossamer.store.format.container import invalid
from gossamer.store.values import ValueDtype, magnitude_bits, to_carrier

_NAME, _METHOD = "peft-shira", "SHIRA"
_PATTERN = re.compile(r"(?P<module>.+)\.shira_(?P<part>indices|weight)", re.DOTALL)
_BASE_KEY = "base_model_name_or_path"
_MAX_RANK = 2**31
_KEYS = ("r", "mask_type", "random_seed", "peft_version")


def _detect(files: Files) -> bool:
    return peft_type(files) == _METHOD


def _read(files: Files, base: BaseWeights, options: ImportOptions) -> Imported:
    config = read_config(files, _METHOD)
    if config.get("fan_in_fan_out"):
        message = f"fan_in_fan_out in {CONFIG}: weights stored as (in, out) are not supported"
        raise AdapterFileError("unsupported_module", message)
    rank = config.get("r")
    if type(rank) is not int or not 1 <= rank < _MAX_RANK:
        invalid(f"r in {CONFIG} must be an integer in [1, {_MAX_RANK})")
    base_name = made_for(config, _BASE_KEY)
    deltas: dict[str, Delta] = {}
    padding = summed = 0
    with open_weights(files) as tensors:
        weights = by_weight(base, tensors, _PATTERN)
        check_names(base, dict.fromkeys(weights), base_name)
        for name, parts in weights.items():
            _check_count(base, name, count_of(tensors, part_of(parts, "weight", name)), rank)
        for name, parts in weights.items():
            delta, dropped, doubled = _delta(tensors, name, parts, base.table[name], options)
            deltas[name] = delta
            padding, summed = padding + dropped, summed + doubled
    return imported(
        _NAME,
        base,
        base_name,
        deltas,
        record=recorded(config, _KEYS),
        facts={"padding_dropped": padding, "duplicates_summed": summed},
        warnings=sum_warnings(summed),
    )


def _check_count(base: BaseWeights, name: str, count: int, rank: int) -> None:
    """All that a SHiRA file says about a weight's shape: PEFT loads no other number of values."""
    sides = sum(base.table[name])
    if count != rank * sides:
        raise AdapterFileError(
            "base_model_mismatch",
            f"{printable(name)} has {count} values; r = {rank} makes {rank * sides} of a weight of "
            f"the base {base.name}",
            tensor=name,
        )
    check_count(name, base.table[name], count)


def _delta(
    tensors: TensorFile,
    name: str,
    parts: Mapping[str, str],
    shape: tuple[int, int],
    options: ImportOptions,
) -> tuple[Delta, int, int]:
    """The delta, how many entries were padding, how many were added to others."""
    indices = part_of(parts, "indices", name)
    values, dtype = tensors.read_values(parts["weight"])
    wanted = (2, values.size)
    if tensors.info(indices).shape != wanted:
        found = list(tensors.info(indices).shape)
        invalid(f"{printable(indices)} has the shape {found}, not {list(wanted)}", indices)
    positions = row_major(name, shape, *tensors.read_positions(indices))
    real = (positions != 0) | (magnitude_bits(values, dtype) != 0)
    if not real.all():
        positions, values = positions[real], values[real]
    delta = element_delta(
        name,
        shape,
        positions,
        values,
        dtype,
        duplicates="sum",  # a sparse tensor of PyTorch adds them up
        rounded_to=options.value_dtype,
    )
    return delta, wanted[1] - positions.size, positions.size - delta.positions.size


def _write(
    delta_set: DeltaSet, base: BaseWeights, folder: Path, options: ExportOptions
) -> Exported:
    check_base(delta_set, base)
    deltas = dict(sorted(delta_set.deltas.items(), key=lambda item: item[0].encode()))
    rank = _rank(deltas)
    dtype = options.value_dtype or "F32"
    plans: list[Planned] = []
    for name, delta in deltas.items():
        count = rank * sum(delta.shape)
        prefix = f"{PEFT_PREFIX}{name.removesuffix('.weight')}"
        indices, values = partial(_indices, delta, count), partial(_values, delta, count, dtype)
        plans.append(Planned(f"{prefix}.shira_indices", "I32", (2, count), indices))
        plans.append(Planned(f"{prefix}.shira_weight", dtype, (count,), values))
    write_tensors(folder / WEIGHTS, plans)
    write_json(folder / CONFIG, _config(base, deltas, rank))
    padding = sum(rank * sum(delta.shape) - delta.nnz for delta in deltas.values())
    facts = {"r": rank, "padding": padding}
    warnings = () if base.folder is None else path_warnings(CONFIG, _BASE_KEY)
    return Exported((CONFIG, WEIGHTS), facts, warnings)


def _rank(deltas: Mapping[str, Delta]) -> int:
    """The smallest r at which every layer has a place for each of its entries.

    Raises:
        AdapterFileError: there are no deltas, or a layer has fewer elements than r makes places.
    """
    if not deltas:
        raise AdapterFileError("unsupported_module", "SHiRA cannot say an adapter without weights")
    needed = {name: max(1, -(-delta.nnz // sum(delta.shape))) for name, delta in deltas.items()}
    asking = max(needed, key=lambda name: needed[name])
    rank = needed[asking]
    for name, delta in deltas.items():
        places, elements = rank * sum(delta.shape), delta.shape[0] * delta.shape[1]
        if places > elements:
            raise AdapterFileError(
                "unsupported_module",
                f"SHiRA cannot say this adapter: {printable(asking)} with its {deltas[asking].nnz} "
                f"entries needs r = {rank}, which makes {places} places in {printable(name)} of "
                f"{elements} elements; PEFT refuses that",
                tensor=name,
            )
    return rank


def _indices(delta: Delta, count: int) -> NDArray[np.int32]:
    """int32 [2, count]: rows and columns, then zeros."""
    positions = delta.elements()[0]
    padded = np.zeros((2, count), "<i4")
    padded[:, : positions.size] = np.divmod(positions, delta.shape[1])
    return padded


def _values(delta: Delta, count: int, dtype: ValueDtype) -> NDArray[Any]:
    """[count] in the carrier of `dtype`: the values, then zeros."""
    values = delta.elements()[1]
    return to_carrier(np.pad(values, (0, count - values.size)), dtype)


def _config(base: BaseWeights, deltas: Mapping[str, Delta], rank: int) -> dict[str, Any]:
    return {
        "peft_type": _METHOD,
        "task_type": "CAUSAL_LM",
        _BASE_KEY: base.name if base.folder is None else str(base.folder),
        "revision": None,
        "inference_mode": True,
        "auto_mapping": None,
        "r": rank,
        "mask_type": "random",
        "random_seed": None,
        "fan_in_fan_out": False,
        "init_weights": True,
        "modules_to_save": None,
        # Whole names: PEFT takes the end of a name for a match too.
        "target_modules": [name.removesuffix(".weight") for name in deltas],
    }


FORMAT = Format(
    _NAME,
    "PEFT SHiRA",
    "https://github.com/huggingface/peft/tree/main/src/peft/tuners/shira",
    importer=Importer(_detect, _read, uploadable=True, reads=(CONFIG, WEIGHTS)),
    exporter=_write,
)
