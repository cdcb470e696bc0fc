"""Reading the `model` of a request: the base, an adapter, or a weighted mix of adapters.

    model   = "base" | term *( "+" term )
    term    = reference [ "*" weight ]

A weight may be negative (`math*-0.3`): `-` between two names would be part of a name. What a
reference may look like is the catalog's (`gossamer.store.catalog.names`).
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from gossamer.api.errors import invalid, model_not_found
from gossamer.store.catalog.errors import InvalidName
from gossamer.store.catalog.names import BASE, Ref

LONGEST = 4096
_WEIGHT = r"[+-]?(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:[eE][+-]?[0-9]+)?"
# The weight comes before the `+` that ends its term, so that 1e+3 is read as one number.
_TERM = re.compile(rf"\s*([^*+\s]+)\s*(?:\*\s*({_WEIGHT})\s*)?(\+|$)")


@dataclass(frozen=True)
class Term:
    """One member of a mix as the request names it."""

    ref: Ref
    weight: float = 1.0


@dataclass(frozen=True)
class ModelString:
    """What a `model` says. `terms` is empty for the base; `is_mix` tells `a*0.5` from `a`."""

    given: str
    terms: tuple[Term, ...]
    is_mix: bool = False


def parse_model(text: str, base_names: Sequence[str] = (BASE,)) -> ModelString:
    """Read a `model`.

    Raises:
        ApiError: 404 when it cannot be the name of a model, 400 when it is no well-formed mix.
    """
    if text in base_names:
        return ModelString(text, ())
    if len(text) > LONGEST:
        raise invalid("model", f"The model is longer than {LONGEST} characters.")
    is_mix = "*" in text or "+" in text
    terms: list[Term] = []
    at = 0
    while True:
        match = _TERM.match(text, at)
        if match is None:
            raise _malformed(text, is_mix)
        name, weight, end = match.groups()
        if name in base_names:
            raise invalid("model", f"{name!r} is in every mix already; name only adapters.")
        terms.append(Term(parse_ref(name), float(weight or 1.0)))
        at = match.end()
        if not end:
            return ModelString(text, tuple(terms), is_mix)


def parse_ref(name: str) -> Ref:
    """Read a reference to one adapter.

    Raises:
        ApiError: 404; a text that can name nothing names nothing that exists.
    """
    try:
        return Ref.parse(name)
    except InvalidName:
        raise model_not_found(name) from None


def _malformed(text: str, is_mix: bool) -> Exception:
    if not is_mix:
        return model_not_found(text)
    return invalid(
        "model", "A mix reads `name*weight+name*weight`; a name may also be `name:version`."
    )
