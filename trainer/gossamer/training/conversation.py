"""A conversation in tokens: each prompt as the server makes it, each answer to where it stops."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from itertools import groupby
from operator import itemgetter
from pathlib import Path

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase as Tokenizer

from gossamer.base.errors import UnsupportedBaseError
from gossamer.training.data import Conversation, Message
from gossamer.training.errors import DataError
from gossamer.training.tokens import Tokens, answer_tokens, continuation, first_token, tokens_of

#: A text that no template looks into: what is rendered behind it, a template writes by itself.
_SENTINEL = "gossamer0sentinel"


@dataclass(frozen=True)
class _Answer:
    """A message of the assistant, as the template renders it.

    Attributes:
        field: where it is in the example.
        prompt: what the server gives the model to answer.
        text: that, with the answer and what the template writes behind it.
        content_end: the character where the answer ends and what is behind it begins.
    """

    field: str
    prompt: str
    text: str
    content_end: int


class _Refused(ValueError):
    """Why a template cannot render a turn, and which."""

    def __init__(self, problem: str, field: str) -> None:
        super().__init__(problem)
        self.field = field


def encode_conversation(
    tokenizer: Tokenizer,
    example: Conversation,
    ends: Collection[int],
    end: int | None,
    file: Path,
    line: int,
) -> list[tuple[list[int], bool]]:
    """Runs of tokens, and whether they are trained.

    The whole conversation is one context for several answers. The prompt of the last one is
    tokenised by itself, as it will be served, so it is that token for token. An earlier answer lies
    within that prompt. Its own prompt is the served one too wherever the long prompt's tokens begin
    with it, which special tokens between the turns make sure of. Where they do not, a token runs
    over the border between that prompt and its answer: the server never gives the model the first
    half of it, so that token is context, and the answer is trained from the next one on.

    An answer is trained up to the token at which the server stops, if the template writes one
    behind it, and nothing after that. If it writes none (the end of a turn that the server does not
    stop at, or only a new line), the last answer is trained up to the end of its text, and `end`
    takes the place of what the template writes: a model that wrote that first would show it to the
    client. An earlier answer is then trained without an end: the prompts that follow hold what the
    template writes there, and a context with another token in its place is never served.

    Messages after the last trained answer are left out.

    Args:
        ends: tokens at which the server stops.
        end: the one to write where the template writes none of these; None: nothing.
        file, line: where the example is, for errors.

    Raises:
        DataError: the template refuses the conversation, or renders an answer otherwise once the
            conversation has gone on.
        UnsupportedBaseError: the tokenizer cannot say where in a text its tokens lie.
    """
    if not tokenizer.is_fast:
        raise UnsupportedBaseError(
            type(tokenizer).__name__,
            "the tokenizer cannot say where in a conversation its tokens lie",
            "Give plain prompts and completions, or use a base with a tokenizer.json",
        )
    messages = example.messages
    try:
        *earlier, last = (
            _answer(tokenizer, messages, index)
            for index, message in enumerate(messages)
            if message.trained
        )
        for answer in earlier:
            _check_kept(answer, last.prompt)
    except _Refused as error:
        raise DataError(file, str(error), line, error.field) from error
    prompt = tokens_of(tokenizer, last.prompt)
    trained = [False] * len(prompt.ids)
    for answer in earlier:
        before = tokens_of(tokenizer, answer.prompt)
        exact = prompt.begins_with(before)
        first = len(before.ids) if exact else first_token(prompt, len(answer.prompt))
        found, _ = answer_tokens(prompt, last.prompt, first, answer.content_end, ends)
        for index in found:
            trained[index] = True
    return [*_runs(prompt.ids, trained), *_last(tokenizer, last, prompt, ends, end)]


def _last(
    tokenizer: Tokenizer, answer: _Answer, prompt: Tokens, ends: Collection[int], end: int | None
) -> list[tuple[list[int], bool]]:
    """The tokens after the last prompt."""
    whole = continuation(tokenizer, answer.prompt, prompt, answer.text[len(answer.prompt) :])
    found, ended = answer_tokens(whole, answer.text, 0, answer.content_end, ends)
    if ended:
        return [(whole.ids[: found.stop], True), (whole.ids[found.stop :], False)]
    said = answer.text[len(answer.prompt) : answer.content_end]
    said_ids = continuation(tokenizer, answer.prompt, prompt, said).ids
    return [(said_ids, True), ([] if end is None else [end], True)]


def _runs(ids: Sequence[int], trained: Sequence[bool]) -> list[tuple[list[int], bool]]:
    marked = zip(ids, trained, strict=True)
    return [([id_ for id_, _ in run], mark) for mark, run in groupby(marked, key=itemgetter(1))]


def _answer(tokenizer: Tokenizer, messages: Sequence[Message], index: int) -> _Answer:
    field = f"messages[{index}]"
    plain = [message.plain() for message in messages[: index + 1]]
    try:
        prompt = _render(tokenizer, plain[:-1], generate=True)
        text = _render(tokenizer, plain, generate=False)
        if not text.startswith(prompt):
            raise _Refused(_REWRITTEN, field)
        content_end = _content_end(tokenizer, plain, text, len(prompt))
    except _Refused:
        raise
    except (TemplateError, ValueError, TypeError) as error:
        raise _Refused(f"the chat template refuses it: {error}", field) from error
    return _Answer(field, prompt, text, content_end)


_REWRITTEN = (
    "the chat template renders this turn differently once it has been answered; "
    "give one example for each answer, ending with it, or earlier answers the weight 0"
)


def _check_kept(answer: _Answer, prompt: str) -> None:
    """A later prompt must hold the answer as it was said; what is behind it may differ (Phi-3's
    template ends conversations with a token that it does not end turns with)."""
    if not prompt.startswith(answer.text[: answer.content_end]):
        raise _Refused(_REWRITTEN, answer.field)


def _content_end(
    tokenizer: Tokenizer, messages: list[dict[str, str]], text: str, begin: int
) -> int:
    """Where in a rendering, whose last answer begins somewhere after `begin`, that answer ends.

    Templates may strip an answer and write something before it (thoughts that it has not). What
    they write behind it is found by rendering another answer.
    """
    said = messages[-1]["content"].strip()
    start = begin + len(text[begin:]) - len(text[begin:].lstrip())
    if text.startswith(said, start) and said:
        end = start + len(said)
        # white space that the answer ends with, if the template has left it there
        rest = messages[-1]["content"].rstrip()
        tail = messages[-1]["content"][len(rest) :]
        return end + len(tail) if text.startswith(tail, end) else end
    other = [*messages[:-1], {**messages[-1], "content": _SENTINEL}]
    _, found, behind = _render(tokenizer, other, generate=False).rpartition(_SENTINEL)
    if found and text.endswith(behind):
        return len(text) - len(behind)
    return len(text.rstrip())


def _render(tokenizer: Tokenizer, messages: list[dict[str, str]], *, generate: bool) -> str:
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=generate)
    return str(text)
