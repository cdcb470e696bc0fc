"""From the names in foreign files to the base's own."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import NoReturn

from gossamer.store.errors import AdapterFileError, printable
from gossamer.store.exchange.base import BaseWeights

#: What PEFT puts before a module's name: its own wrapper, and the tuner's.
PEFT_PREFIX = "base_model.model."
_NAMED = 3
#: Of a shape, for messages: a file may say one of any length.
_SHOWN_SIDES = 8


def shape_of(base: BaseWeights, name: str) -> tuple[int, ...] | None:
    """The shape of a parameter under any of its names; None where the base has none."""
    return base.parameters.get(base.aliases.get(name, name))


def check_known(
    base: BaseWeights, wanted: Mapping[str, Sequence[int] | None], made_for: str = ""
) -> None:
    """Whether the base has parameters of these names and shapes.

    Args:
        wanted: name in the base's own naming, also the second one of a tied parameter → shape,
            where the file says one.
        made_for: the base that the file says it is for.

    Raises:
        AdapterFileError: `base_model_mismatch`, the first three named.
    """
    strange = [_mismatch(base, name, shape) for name, shape in wanted.items()]
    found = [(name, why) for name, why in zip(wanted, strange, strict=True) if why]
    if found:
        by = f" (made for {printable(made_for)})" if made_for else ""
        named = "; ".join(why for _, why in found[:_NAMED])
        raise AdapterFileError(
            "base_model_mismatch",
            f"the adapter's weights are not those of the base {base.name}{by}: {named}",
            tensor=found[0][0],
        )


def check_names(
    base: BaseWeights, wanted: Mapping[str, Sequence[int] | None], made_for: str = ""
) -> None:
    """Whether the base has these weights and a delta may change them.

    Args:
        wanted, made_for: as in `check_known`.

    Raises:
        AdapterFileError: `base_model_mismatch`, the first three named; `unsupported_module` for a
            parameter that the base has and no delta may change.
    """
    check_known(base, wanted, made_for)
    for name in wanted:
        if name not in base.table:
            refuse_module(name)


def _mismatch(base: BaseWeights, name: str, shape: Sequence[int] | None) -> str:
    own = base.table.get(name, shape_of(base, name))
    if own is None:
        return f"{printable(name)} is unknown here"
    if shape is not None and tuple(shape) != own:
        there, here = map(_shown, (shape, own))
        return f"{printable(name)} is {there}, {here} here"
    return ""


def _shown(shape: Sequence[int]) -> str:
    more = ["…"] if len(shape) > _SHOWN_SIDES else []
    return "×".join([*map(str, shape[:_SHOWN_SIDES]), *more])


def refuse_module(name: str) -> NoReturn:
    """Refuse what changes something else than a linear weight.

    Raises:
        AdapterFileError: `unsupported_module`
    """
    raise AdapterFileError(
        "unsupported_module",
        f"{printable(name)} is not a linear weight that this server can apply a delta to",
        tensor=name,
    )


def without_prefix(name: str, prefixes: Iterable[str] = (PEFT_PREFIX,)) -> str:
    """The name after the first of the prefixes that it begins with."""
    for prefix in prefixes:
        if name.startswith(prefix):
            return name[len(prefix) :]
    return name
