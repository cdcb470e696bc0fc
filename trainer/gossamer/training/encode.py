"""From examples to token ids, with a mark on the tokens whose loss counts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import TemplateError
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase as Tokenizer

from gossamer.training.data import Completion, Conversation, Examples
from gossamer.training.errors import DataError


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


def encode_examples(examples: Examples, tokenizer: Tokenizer, max_length: int) -> EncodedExamples:
    """All examples of a file in tokens; those longer than `max_length` are left out and counted.

    Prompts are tokenised as at serving time: a prompt with the tokenizer's special tokens, a
    conversation by its chat template. A completion ends with the end-of-sequence token.

    Raises:
        DataError: no example fits, or the tokenizer's template cannot render one.
    """
    fitting = []
    for located in examples.located:
        example = located.example
        if isinstance(example, Completion):
            encoded = _completion(example, tokenizer)
        else:
            encoded = _conversation(example, tokenizer, examples.file, located.line)
        if not encoded.trained.any():
            raise DataError(examples.file, "it has no token to train on", located.line)
        if encoded.ids.size <= max_length:
            fitting.append(encoded)
    if not fitting:
        raise DataError(examples.file, f"no example fits into {max_length} tokens")
    return EncodedExamples(fitting, len(examples.located) - len(fitting))


def _completion(example: Completion, tokenizer: Tokenizer) -> Encoded:
    prompt = tokenizer(example.prompt)["input_ids"]
    whole = tokenizer(example.prompt + example.completion)["input_ids"]
    if whole[: len(prompt)] == prompt and len(whole) > len(prompt):
        completion = whole[len(prompt) :]
    else:
        # The border runs through a token of the whole text; a served prompt ends at the border.
        completion = tokenizer(example.completion, add_special_tokens=False)["input_ids"]
    if tokenizer.eos_token_id is not None and completion[-1:] != [tokenizer.eos_token_id]:
        completion = [*completion, tokenizer.eos_token_id]
    return _encoded([(prompt, False), (completion, True)])


def _conversation(example: Conversation, tokenizer: Tokenizer, file: Path, line: int) -> Encoded:
    messages = [message.model_dump() for message in example.messages]
    parts: list[tuple[list[int], bool]] = []
    done = ""
    for index, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        field = f"messages[{index}]"
        try:
            prompt = _render(tokenizer, messages[:index], generate=True)
            answered = _render(tokenizer, messages[: index + 1], generate=False)
        except (TemplateError, ValueError, TypeError) as error:
            raise DataError(file, f"the chat template refuses it: {error}", line, field) from error
        if not (answered.startswith(prompt) and prompt.startswith(done)):
            problem = (
                "the chat template renders this turn differently once it has been answered; "
                "give one example for each answer, ending with it"
            )
            raise DataError(file, problem, line, field)
        parts.append((_plain(tokenizer, prompt[len(done) :]), False))
        completion = _plain(tokenizer, answered[len(prompt) :])
        parts += _split_at_end(completion, tokenizer.eos_token_id)
        done = answered
    return _encoded(parts)


def _render(tokenizer: Tokenizer, messages: list[dict[str, Any]], *, generate: bool) -> str:
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=generate)
    return str(text)


def _plain(tokenizer: Tokenizer, text: str) -> list[int]:
    """The ids of text that already holds its special tokens."""
    ids: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
    return ids


def _split_at_end(ids: list[int], eos: int | None) -> list[tuple[list[int], bool]]:
    """What a template writes after the end of a turn is context, not completion."""
    if eos is None or eos not in ids:
        return [(ids, True)]
    end = ids.index(eos) + 1
    return [(ids[:end], True), (ids[end:], False)]


def _encoded(parts: Sequence[tuple[list[int], bool]]) -> Encoded:
    ids = np.array([token for tokens, _ in parts for token in tokens], np.int64)
    trained = np.array([mark for tokens, mark in parts for _ in tokens], np.bool_)
    trained[:1] = False  # nothing comes before it to predict it from
    return Encoded(ids, trained)
