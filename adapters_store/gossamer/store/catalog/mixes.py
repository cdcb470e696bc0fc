"""Reading what names a model: one adapter, or a weighted mix of adapters.

    model = term *( "+" term )
    term  = reference [ "*" weight ]

A weight may be negative (`math*-0.3`): `-` between two names would be part of a name.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

from gossamer.store.catalog.errors import InvalidName
from gossamer.store.catalog.names import Ref

#: of a mix, in characters
LONGEST = 4096
#: Earlier tasks of a LoTTO chain that one version may continue; a record that names more is not
#: read.
MAX_PARENTS = 16
_WEIGHT = r"[+-]?(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:[eE][+-]?[0-9]+)?"
# The weight comes before the `+` that ends its term, so that 1e+3 is read as one number.
_TERM = re.compile(rf"\s*([^*+\s]+)\s*(?:\*\s*({_WEIGHT})\s*)?(\+|$)")


@dataclass(frozen=True)
class Term:
    """One member of a mix as a text names it."""

    ref: Ref
    weight: float = 1.0


def parse_terms(text: str) -> tuple[Term, ...]:
    """The members of `text`, in its order; at least one.

    Raises:
        InvalidName: it is no reference and no well-formed mix of references.
    """
    if len(text) > LONGEST:
        raise InvalidName(text, f"it is longer than {LONGEST} characters")
    terms: list[Term] = []
    at = 0
    while True:
        match = _TERM.match(text, at)
        if match is None:
            raise InvalidName(text, "a model reads `name`, or `name*weight+name*weight`")
        name, given, end = match.groups()
        weight = float(given or 1.0)
        if not math.isfinite(weight):
            raise InvalidName(text, "a weight is a finite number")
        terms.append(Term(Ref.parse(name), weight))
        at = match.end()
        if not end:
            return tuple(terms)
