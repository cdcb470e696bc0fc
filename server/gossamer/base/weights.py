"""The base as importers and exporters of adapters see it (`store.exchange.base.BaseWeights`)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from gossamer.base.errors import CorruptBaseError, UnsupportedBaseError
from gossamer.base.load import LOADING_ERRORS, BaseFiles, quiet
from gossamer.base.patch_map import adapter_table
from gossamer.store.errors import AdapterFileError, printable
from gossamer.store.exchange.files import Files
from gossamer.store.exchange.shards import Shards, Stored, loaded_names
from gossamer.store.values import CARRIER, ValueDtype


@dataclass(frozen=True)
class BaseNames:
    """A base's names and shapes, without its weights: what a server imports uploads against.

    Attributes:
        name, fingerprint: of the base.
        table: name → (out_features, in_features) of the weights that a delta may change.
        parameters: name → shape of every parameter, a tied one under its first name.
        aliases: the other names of tied parameters → the first one.
    """

    name: str
    fingerprint: str
    table: Mapping[str, tuple[int, int]]
    parameters: Mapping[str, tuple[int, ...]]
    aliases: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def of(cls, base: BaseFiles) -> BaseNames:
        """Read off the configuration; no weight is loaded.

        Raises:
            UnsupportedBaseError: transformers makes no causal language model of it.
        """
        return cls.of_model(base, _skeleton(base.path))

    @classmethod
    def of_model(cls, base: BaseFiles, model: PreTrainedModel) -> BaseNames:
        """Read off transformers' model of the base, which the engine has not packed yet."""
        once = dict(model.named_parameters())
        first = {id(parameter): name for name, parameter in once.items()}
        every = model.named_parameters(remove_duplicate=False)
        return cls(
            name=base.name,
            fingerprint=base.fingerprint,
            table=adapter_table(model),
            parameters={name: tuple(parameter.shape) for name, parameter in once.items()},
            aliases={name: first[id(one)] for name, one in every if name not in once},
        )

    @property
    def folder(self) -> Path | None:
        """None: the files are not to be used here."""
        return None

    def read(self, name: str) -> tuple[NDArray[Any], ValueDtype]:
        """Refused: the weights are not at hand.

        Raises:
            AdapterFileError: `unsupported_module`
        """
        _refuse(f"{printable(name)}: the base's weights are not at hand here", name)


@dataclass(frozen=True)
class StoredWeights:
    """A base's names, shapes and, read from its files on demand, its weights.

    Attributes:
        names: of the base.
        folder: the Hugging Face directory.
    """

    names: BaseNames
    folder: Path
    _shards: Shards
    _places: Mapping[str, Stored]

    @classmethod
    def of(cls, base: BaseFiles) -> StoredWeights:
        """Inspect the configuration and the headers of the files; no weight is read.

        A pair that the configuration ties and the files hold twice is read, as transformers does:
        where the two differ they are two parameters.

        Raises:
            UnsupportedBaseError: transformers makes no causal language model of it.
            CorruptBaseError: the files are not a checkpoint, or not of the configuration's shapes.
        """
        model = _skeleton(base.path)
        names = BaseNames.of_model(base, model)
        try:
            shards = Shards.of(Files.at(base.path))
            found = _places(base.path, names, model, shards)
            return cls(_untied(names, shards, found), base.path, shards, found)
        except AdapterFileError as error:
            raise CorruptBaseError(base.path, error.message) from error

    @property
    def name(self) -> str:
        """For people."""
        return self.names.name

    @property
    def fingerprint(self) -> str:
        """Which model it is."""
        return self.names.fingerprint

    @property
    def table(self) -> Mapping[str, tuple[int, int]]:
        """Name → (out_features, in_features) of the weights that a delta may change."""
        return self.names.table

    @property
    def parameters(self) -> Mapping[str, tuple[int, ...]]:
        """Name → shape of every parameter, a tied one under its first name."""
        return self.names.parameters

    @property
    def aliases(self) -> Mapping[str, str]:
        """The other names of tied parameters → the first one."""
        return self.names.aliases

    def read(self, name: str) -> tuple[NDArray[Any], ValueDtype]:
        """A parameter as its file stores it: its carrier of `parameters[name]`, and the dtype.

        Any name of a tied parameter reads it, whichever of them the files know.

        Raises:
            AdapterFileError: `unsupported_module`, the files hold no weight of that name, or not
                in float32, float16 or bfloat16.
        """
        first = self.names.aliases.get(name, name)
        others = [alias for alias, own in self.names.aliases.items() if own == first]
        stored = next((self._places[one] for one in (first, *others) if one in self._places), None)
        if stored is None:
            _refuse(f"the files of {self.name} hold no weight {printable(name)}", name)
        if stored.dtype not in CARRIER:
            _refuse(f"the base stores {printable(name)} as {stored.dtype}", name)
        return self._shards.read_values(stored)


def _skeleton(path: Path) -> PreTrainedModel:
    """The model of a directory's configuration, its parameters without values."""
    with quiet():
        try:
            config = AutoConfig.from_pretrained(
                path, local_files_only=True, trust_remote_code=False
            )
            with torch.device("meta"):
                model: PreTrainedModel = AutoModelForCausalLM.from_config(config)
        except LOADING_ERRORS as error:
            raise UnsupportedBaseError(
                path.name,
                f"transformers makes no model of its configuration ({error})",
                "Use a causal language model whose class is part of transformers",
            ) from error
    return model


def _places(
    path: Path, names: BaseNames, model: PreTrainedModel, shards: Shards
) -> dict[str, Stored]:
    """Each name of a parameter, tied ones too, that the files know → where it lies."""
    known = {**names.parameters, **{n: names.parameters[own] for n, own in names.aliases.items()}}
    own_names = loaded_names(shards.tensors, known, [model.base_model_prefix])
    found: dict[str, Stored] = {}
    for stored_name, own in own_names.items():
        stored = shards.tensors[stored_name]
        if own in found:
            both = f"{found[own].name} and {stored_name}"
            raise CorruptBaseError(path, f"the files hold {both}, which are one weight")
        if stored.shape != known[own]:
            raise CorruptBaseError(
                path, f"{stored_name} has the shape {stored.shape}, not {known[own]}"
            )
        found[own] = stored
    return found


def _untied(names: BaseNames, shards: Shards, found: Mapping[str, Stored]) -> BaseNames:
    """The names, where what the configuration ties is stored as two different weights."""
    apart = [
        alias
        for alias, first in names.aliases.items()
        if alias in found and first in found and not _equal(shards, found[alias], found[first])
    ]
    if not apart:
        return names
    aliases = {alias: own for alias, own in names.aliases.items() if alias not in apart}
    more = {alias: names.parameters[names.aliases[alias]] for alias in apart}
    return BaseNames(
        names.name, names.fingerprint, names.table, {**names.parameters, **more}, aliases
    )


def _equal(shards: Shards, one: Stored, other: Stored) -> bool:
    return one.dtype == other.dtype and np.array_equal(shards.read(one), shards.read(other))


def _refuse(message: str, name: str) -> NoReturn:
    raise AdapterFileError("unsupported_module", message, tensor=name)
