"""Which tensor of a fine-tuned checkpoint is which parameter of its base."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from gossamer.store.errors import AdapterFileError, printable
from gossamer.store.exchange.base import BaseWeights
from gossamer.store.exchange.files import Files
from gossamer.store.exchange.names import check_known, shape_of
from gossamer.store.exchange.shards import Shards, Stored, loaded_names, prefixes_of
from gossamer.store.format.container import invalid

CONFIG = "config.json"
_NAMED = 3
#: What older versions of transformers wrote as tensors and newer ones make of the configuration.
_BUFFERS = re.compile(
    r"(.*\.)?(rotary_emb\.inv_freq|(attn|attention)\.(masked_)?bias|position_ids)", re.DOTALL
)
#: What a configuration may say otherwise without another result of the model.
_HARMLESS = frozenset(
    [
        "_name_or_path",
        "architectures",
        "auto_map",
        "bos_token_id",
        "dtype",
        "eos_token_id",
        "gradient_checkpointing",
        "initializer_range",
        "model_type",
        "pad_token_id",
        "quantization_config",
        "tie_word_embeddings",
        "torch_dtype",
        "transformers_version",
        "unsloth_version",
        "use_cache",
        "vocab_size",
    ]
)


@dataclass(frozen=True)
class Twin:
    """A tensor that must equal a parameter of the base, because one of the two is tied there.

    Attributes:
        name: that a message calls it.
        own: the base's name.
    """

    name: str
    stored: Stored
    own: str


@dataclass(frozen=True)
class Matched:
    """A checkpoint whose names and shapes are those of the base.

    Attributes:
        places: the base's parameters → where the checkpoint has them.
        twins: what else must be compared.
        ignored: tensors that are no parameters.
    """

    shards: Shards
    places: Mapping[str, Stored]
    twins: tuple[Twin, ...]
    ignored: tuple[str, ...]


def match(files: Files, base: BaseWeights) -> Matched:
    """The checkpoint's tensors; only headers are read.

    Raises:
        AdapterFileError: malformed; `base_model_mismatch`; `unsupported_module` where the
            vocabulary has grown; `unsupported_file`, quantized.
    """
    shards = Shards.of(files)
    names = loaded_names(shards.tensors, base.parameters, prefixes_of(base.parameters))
    places: dict[str, Stored] = {}
    for key, own in names.items():
        if own in places:
            both = f"{printable(places[own].name)} and {printable(key)}"
            invalid(f"{both} are the same weight", key)
        places[own] = shards.tensors[key]
    twins, ignored, unknown = _others(shards, base, names)
    second = {base.aliases[twin.own]: twin.stored for twin in twins}
    _check_vocabulary(base, {**second, **places})
    shapes = {own: stored.shape for own, stored in places.items()}
    check_known(base, {**shapes, **{key: shards.tensors[key].shape for key in unknown}})
    twins += _missing(base, places, second.keys() - base.table.keys())
    for twin in twins:
        if twin.stored.shape != shape_of(base, twin.own):
            invalid(f"it has the shape {list(twin.stored.shape)}", twin.name)
    return Matched(shards, places, tuple(twins), tuple(ignored))


def _others(
    shards: Shards, base: BaseWeights, names: Mapping[str, str]
) -> tuple[list[Twin], list[str], list[str]]:
    """Of what is none of the base's parameters: second names of tied ones, buffers, the rest."""
    twins: list[Twin] = []
    ignored: list[str] = []
    unknown: list[str] = []
    for key, stored in shards.tensors.items():
        if key in names:
            continue
        if _BUFFERS.fullmatch(key):
            ignored.append(key)
        elif key in base.aliases:
            twins.append(Twin(key, stored, key))
        else:
            unknown.append(key)
    return twins, ignored, unknown


def _check_vocabulary(base: BaseWeights, places: Mapping[str, Stored]) -> None:
    for own, shape in base.parameters.items():
        stored = places.get(own)
        if own in base.table or stored is None or len(shape) != 2 or len(stored.shape) != 2:
            continue
        if stored.shape[0] > shape[0] and stored.shape[1] == shape[1]:
            raise AdapterFileError(
                "unsupported_module",
                f"{printable(stored.name)} has {stored.shape[0]} rows, {shape[0]} here: tokens "
                "were added to the vocabulary, which an adapter cannot carry",
                tensor=stored.name,
            )


def _missing(
    base: BaseWeights, places: Mapping[str, Stored], second: Collection[str]
) -> list[Twin]:
    """What the base has and the checkpoint has not: nothing, but for a head that is tied there.

    Args:
        second: tied parameters that are there under their second names.

    Raises:
        AdapterFileError: `base_model_mismatch`
    """
    missing = [own for own in base.parameters if own not in places and own not in second]
    if len(missing) == 1 and missing[0] not in base.table:
        (head,) = missing
        shape = base.parameters[head]
        alike = [n for n in places if n not in base.table and base.parameters[n] == shape]
        if len(shape) == 2 and len(alike) == 1:
            return [Twin(head, places[alike[0]], head)]
    if missing:
        named = ", ".join(map(printable, missing[:_NAMED]))
        more = f" and {len(missing) - _NAMED} more" if len(missing) > _NAMED else ""
        raise AdapterFileError(
            "base_model_mismatch",
            f"the checkpoint lacks {named}{more}, which the base {base.name} has",
            tensor=missing[0],
        )
    return []


def check_config(files: Files, base: BaseWeights) -> tuple[Mapping[str, Any], tuple[str, ...]]:
    """The checkpoint's configuration, and what a user is told of it.

    Raises:
        AdapterFileError: malformed; `base_model_mismatch`, of another architecture;
            `unsupported_file`, the weights are quantized.
    """
    if CONFIG not in files:
        return {}, (f"there is no {CONFIG}: only names and shapes of the weights were compared",)
    config = files.json(CONFIG)
    if config.get("quantization_config"):
        raise AdapterFileError(
            "unsupported_file",
            "the checkpoint's weights are quantized, and their differences to the base are not "
            "those of its training; import the original one",
        )
    if base.folder is None:
        return config, ()
    own = Files.at(base.folder).json(CONFIG)
    there, here = config.get("model_type"), own.get("model_type")
    if there != here:
        kinds = (printable(str(kind)[:100]) for kind in (there, here))
        raise AdapterFileError(
            "base_model_mismatch",
            "the checkpoint is of the architecture {}, the base of {}".format(*kinds),
        )
    other = sorted(k for k in config.keys() & own.keys() - _HARMLESS if config[k] != own[k])
    if not other:
        return config, ()
    keys = ", ".join(map(printable, other[:5]))
    return config, (
        f"its {CONFIG} says otherwise than the base's: {keys}; an adapter carries the differences "
        "of the weights only",
    )
