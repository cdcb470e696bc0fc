"""What the adapters that PEFT saves have in common: a configuration, and one file of tensors."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NoReturn

from gossamer.store.errors import AdapterFileError, printable
from gossamer.store.exchange.base import BaseWeights
from gossamer.store.exchange.files import Files
from gossamer.store.exchange.names import refuse_module, without_prefix
from gossamer.store.exchange.tensors import TensorFile
from gossamer.store.format.container import invalid

CONFIG, WEIGHTS, PICKLE = "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"
_TO_SAFETENSORS = (
    f"on your own machine: safetensors.torch.save_file(torch.load('{PICKLE}', weights_only=True), "
    f"'{WEIGHTS}')"
)


def peft_type(files: Files) -> str | None:
    """The method that the configuration names; None where there is no such file."""
    if CONFIG not in files:
        return None
    try:
        found = files.json(CONFIG).get("peft_type")
    except AdapterFileError:  # whoever reads it says what is wrong with it
        return None
    return found if isinstance(found, str) else None


def read_config(files: Files, method: str) -> dict[str, Any]:
    """The configuration of an adapter that holds this method's tensors and nothing else.

    Raises:
        AdapterFileError: `unsupported_file` for another method, `unsupported_module` where modules
            are saved whole.
    """
    config = files.json(CONFIG)
    found = config.get("peft_type")
    if found != method:
        named = printable(found) if isinstance(found, str) else "no name"
        raise AdapterFileError(
            "unsupported_file", f"peft_type in {CONFIG} is {named}, not {method}"
        )
    for key, what in (
        ("modules_to_save", "modules that were trained whole"),
        ("trainable_token_indices", "embeddings"),
        ("bias", "biases"),
    ):
        if config.get(key) not in (None, [], {}, "none"):
            _refuse_key(key, what)
    return config


def _refuse_key(key: str, what: str) -> NoReturn:
    message = f"{key} in {CONFIG}: this server cannot apply {what}"
    raise AdapterFileError("unsupported_module", message)


@contextmanager
def open_weights(files: Files) -> Iterator[TensorFile]:
    """The adapter's tensors.

    Raises:
        AdapterFileError: missing or malformed; `unsupported_file` where there is a pickle instead.
    """
    if WEIGHTS not in files and PICKLE in files:
        message = f"{PICKLE} is a Python pickle, which is never opened here; convert it"
        raise AdapterFileError("unsupported_file", f"{message} {_TO_SAFETENSORS}")
    with files.tensors(WEIGHTS) as tensors:
        yield tensors


def by_weight(
    base: BaseWeights, tensors: TensorFile, pattern: re.Pattern[str]
) -> dict[str, dict[str, str]]:
    """Base weight name → part → name of the tensor in the file, in byte order of the weights.

    Args:
        pattern: matches the method's own tensors whole, with the groups `module` and `part`.

    Raises:
        AdapterFileError: a tensor belongs to nothing, or a part is there twice;
            `unsupported_module` for a parameter saved whole.
    """
    found: dict[str, dict[str, str]] = {}
    for key in tensors.infos:
        match = pattern.fullmatch(key)
        if match is None:
            _refuse_stray(base, key)
        parts = found.setdefault(f"{without_prefix(match['module'])}.weight", {})
        if match["part"] in parts:
            invalid(f"{printable(key)} is there twice, once for another adapter's name", key)
        parts[match["part"]] = key
    if not found:
        invalid(f"{WEIGHTS} holds no tensors")
    return dict(sorted(found.items(), key=lambda item: item[0].encode()))


def part_of(parts: Mapping[str, str], part: str, weight: str) -> str:
    """The name of a weight's tensor.

    Raises:
        AdapterFileError: there is none.
    """
    if part not in parts:
        invalid(f"{printable(weight)} has no {part}", weight)
    return parts[part]


def count_of(tensors: TensorFile, name: str) -> int:
    """The length of a tensor of one dimension.

    Raises:
        AdapterFileError: it has another number of dimensions.
    """
    shape = tensors.info(name).shape
    if len(shape) != 1:
        invalid(f"{printable(name)} has {len(shape)} dimensions, not 1", name)
    return shape[0]


def _refuse_stray(base: BaseWeights, key: str) -> NoReturn:
    name = without_prefix(key)
    if name in base.parameters or name.endswith((".weight", ".bias")):
        refuse_module(name)
    invalid(f"{printable(key)} belongs to nothing in this format", key)
