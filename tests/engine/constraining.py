"""What the tests of constraints share: masks as sets of tokens, and texts that keep to them."""

from __future__ import annotations

import random
import re
from typing import Any

import numpy as np

from gossamer.engine.grammar import Grammar
from gossamer.engine.messages import Constraint
from tests.tiny import EOS_ID, VOCAB_SIZE, tiny_tokenizer

TOKENIZER = tiny_tokenizer()
#: The model's vocabulary is padded, as many models' are.
PADDED = VOCAB_SIZE + 37
TEXTS = [TOKENIZER.decode([token]) for token in range(VOCAB_SIZE)]

SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 8},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "tags": {"type": "array", "items": {"enum": ["a", "b"]}, "maxItems": 3},
        "next": {"anyOf": [{"type": "null"}, {"$ref": "#/$defs/id"}]},
    },
    "required": ["name", "age", "next"],
    "additionalProperties": False,
    "$defs": {"id": {"type": "string", "pattern": "^[A-Z]{2}[0-9]{2}$"}},
}

#: The longer a text, the more ways there are to read it.
AMBIGUOUS = Grammar("start: s\ns: /[a-z]/ | s s | s s s")


def allowed(constraint: Constraint) -> set[int]:
    """The tokens that may come next."""
    # what was in the array before must not matter
    mask = np.random.default_rng(0).random(PADDED) < 0.5
    constraint.fill_mask(mask)
    return set(np.flatnonzero(mask).tolist())


def say(constraint: Constraint, text: str) -> bool:
    """Whether every token of `text` is allowed in its turn; stops before the first that is not."""
    for token in TOKENIZER.encode(text, add_special_tokens=False):
        if token not in allowed(constraint):
            return False
        constraint.accept(token)
    return True


def may_end(constraint: Constraint) -> bool:
    """Whether the end may come next."""
    return EOS_ID in allowed(constraint)


def babble(constraint: Constraint, seed: int, most: int = 600) -> str | None:
    """A random text that the constraint allows, or None when it has no end within `most` tokens."""
    draw = random.Random(seed)  # noqa: S311
    tokens: list[int] = []
    for _ in range(most):
        choices = sorted(allowed(constraint))
        assert choices, "nothing is allowed"
        token = EOS_ID if EOS_ID in choices and draw.random() < 0.3 else draw.choice(choices)
        if token == EOS_ID:
            return str(TOKENIZER.decode(tokens))
        constraint.accept(token)
        tokens.append(token)
        if constraint.is_finished():
            return str(TOKENIZER.decode(tokens))
    return None


def obeys_schema(value: Any) -> bool:
    """Whether a value is as SCHEMA says, by other means."""
    return (
        set(value) - {"tags"} == {"name", "age", "next"}
        and len(value["name"]) <= 8
        and type(value["age"]) is int
        and 0 <= value["age"] <= 150
        and (value["next"] is None or bool(re.fullmatch("[A-Z]{2}[0-9]{2}", value["next"])))
        and all(tag in ("a", "b") for tag in value.get("tags", []))
        and len(value.get("tags", [])) <= 3
    )
