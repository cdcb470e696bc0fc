"""Reading the `model` of a request: the base, an adapter, or a weighted mix of adapters.

    model   = "base" | mix

What a mix and its references look like is the catalog's (`gossamer.store.catalog.mixes`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from gossamer.api.errors import invalid, model_not_found
from gossamer.store.catalog.errors import InvalidName
from gossamer.store.catalog.mixes import Term, parse_terms
from gossamer.store.catalog.names import BASE, Ref


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
    is_mix = "*" in text or "+" in text
    try:
        terms = parse_terms(text)
    except InvalidName as error:
        if not is_mix:
            raise model_not_found(text) from None
        raise invalid("model", f"This is no mix: {error.why}.") from error
    for term in terms:
        if term.ref.given in base_names:
            raise invalid(
                "model", f"{term.ref.given!r} is in every mix already; name only adapters."
            )
    return ModelString(text, terms, is_mix)


def parse_ref(name: str) -> Ref:
    """Read a reference to one adapter.

    Raises:
        ApiError: 404; a text that can name nothing names nothing that exists.
    """
    try:
        return Ref.parse(name)
    except InvalidName:
        raise model_not_found(name) from None
