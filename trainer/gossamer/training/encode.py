"""From examples to token ids, with a mark on the tokens whose loss counts."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase as Tokenizer

from gossamer.training.conversation import encode_conversation
from gossamer.training.data import Completion, Examples, never, unless_stopped
from gossamer.training.errors import DataError
from gossamer.training.tokens import continuation, tokens_of


@dataclass(frozen=True, eq=False)
class Encoded:
    """One example in tokens.

    Attributes:
        ids: int64 [n].
        trained: bool [n], the tokens of completions; the first token is never one.
    """

    ids: NDArray[np.int64]
    trained: NDArray[np.bool_]

    @property
    def scored(self) -> int:
        """How many of the last positions have logits that matter: from the one before the first
        trained token on."""
        return int(self.ids.size - self.trained.argmax() + 1)


@dataclass(frozen=True)
class EncodedExamples:
    """The examples that fit, and the number of those that were longer than the maximum."""

    fitting: Sequence[Encoded]
    dropped: int


def encode_examples(
    examples: Examples,
    tokenizer: Tokenizer,
    max_length: int,
    *,
    ends: Collection[int] | None = None,
    stop: Callable[[], bool] = never,
) -> EncodedExamples:
    """All examples of a file in tokens; those longer than `max_length` are left out and counted.

    Prompts are tokenised as at serving time: a prompt with the tokenizer's special tokens, a
    conversation by its chat template. An answer ends with a token at which the server stops, and
    nothing is trained behind that; `encode_conversation` says what becomes of what a template
    writes there.

    Args:
        ends: tokens at which the server stops (`gossamer.base.ends`); None: the tokenizer's
            end-of-sequence token alone.
        stop: asked every few dozen examples.

    Raises:
        DataError: no example fits, or the tokenizer's template cannot render one.
        StoppedError: `stop` said so.
        UnsupportedBaseError: there are conversations, and the tokenizer cannot say where in a text
            its tokens lie.
    """
    own = tokenizer.eos_token_id
    if ends is None:
        ends = () if own is None else (own,)
    end = min(ends, default=None) if own is None else own
    fitting = []
    for located in unless_stopped(examples.located, stop):
        example = located.example
        if isinstance(example, Completion):
            parts = _completion(example, tokenizer, ends, end)
        else:
            parts = encode_conversation(tokenizer, example, ends, end, examples.file, located.line)
        encoded = _encoded(parts)
        if not encoded.trained.any():
            raise DataError(examples.file, "it has no token to train on", located.line)
        if encoded.ids.size <= max_length:
            fitting.append(encoded)
    if not fitting:
        raise DataError(examples.file, f"no example fits into {max_length} tokens")
    return EncodedExamples(fitting, len(examples.located) - len(fitting))


def _completion(
    example: Completion, tokenizer: Tokenizer, ends: Collection[int], end: int | None
) -> list[tuple[list[int], bool]]:
    prompt = tokens_of(tokenizer, example.prompt, special=True)
    found = continuation(tokenizer, example.prompt, prompt, example.completion, special=True)
    completion = found.ids
    if end is not None and not (completion and completion[-1] in ends):
        completion = [*completion, end]
    return [(prompt.ids, False), (completion, True)]


def _encoded(parts: Sequence[tuple[list[int], bool]]) -> Encoded:
    ids = np.array([token for tokens, _ in parts for token in tokens], np.int64)
    trained = np.array([mark for tokens, mark in parts for _ in tokens], np.bool_)
    trained[:1] = False  # nothing comes before it to predict it from
    return Encoded(ids, trained)
