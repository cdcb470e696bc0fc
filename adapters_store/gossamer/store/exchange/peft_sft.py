"""Alan Ansell's fork of PEFT: SFT, sparse fine-tuning with positions that are chosen anew."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from gossamer.store.delta import Delta
from gossamer.store.errors import printable
from gossamer.store.exchange.base import BaseWeights
from gossamer.store.exchange.files import Files
from gossamer.store.exchange.formats import Format, Imported, Importer, ImportOptions
from gossamer.store.exchange.names import check_names
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
from gossamer.store.exchange.peft_flat import flat_delta
from gossamer.store.exchange.records import imported, made_for, recorded, sum_warnings
from gossamer.store.format.container import invalid

_NAME, _METHOD = "peft-sft", "SFT"
#: With the name of the adapter inside, where the file was not written by PEFT's own saving.
_PATTERN = re.compile(r"(?P<module>.+)\.sft_delta(?:\.[^.]+)?\.(?P<part>indices|values)", re.DOTALL)
_KEYS = ("density", "num_tunable_weights", "selection_algorithm", "reselection_steps")


def _detect(files: Files) -> bool:
    return peft_type(files) == _METHOD


def _read(files: Files, base: BaseWeights, options: ImportOptions) -> Imported:
    config = read_config(files, _METHOD)
    base_name = made_for(config, "base_model_name_or_path")
    deltas: dict[str, Delta] = {}
    summed = 0
    with open_weights(files) as tensors:
        weights = by_weight(base, tensors, _PATTERN)
        check_names(base, dict.fromkeys(weights), base_name)
        counts = {
            name: count_of(tensors, part_of(parts, "values", name))
            for name, parts in weights.items()
        }
        _check_counts(config.get("num_deltas"), counts)
        for name, parts in weights.items():
            deltas[name], doubled = flat_delta(tensors, name, parts, base.table[name], options)
            summed += doubled
    return imported(
        _NAME,
        base,
        base_name,
        deltas,
        record=recorded(config, _KEYS),
        facts={"duplicates_summed": summed},
        warnings=sum_warnings(summed),
    )


def _check_counts(declared: Any, counts: Mapping[str, int]) -> None:
    """The configuration, where it counts the values of each module, and the tensors agree."""
    if declared is None:
        return
    if not isinstance(declared, dict):
        invalid(f"num_deltas in {CONFIG} must count the values of each module")
    wanted = {f"{module}.weight": count for module, count in declared.items()}
    for name in sorted(wanted.keys() | counts.keys()):
        if wanted.get(name) != counts.get(name):
            said, found = (printable(str(one.get(name))) for one in (wanted, counts))
            invalid(
                f"num_deltas in {CONFIG}: {printable(name)} has {found} values, not {said}", name
            )


FORMAT = Format(
    _NAME,
    "SFT of AlanAnsell/peft",
    "https://github.com/AlanAnsell/peft/tree/main/src/peft/tuners/sft",
    importer=Importer(_detect, _read, uploadable=True, reads=(CONFIG, WEIGHTS)),
)
