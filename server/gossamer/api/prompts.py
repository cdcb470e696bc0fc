"""From what a request says to token ids: the tokenizer and the base's chat template."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from functools import partial

import anyio
from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from gossamer.api.errors import ApiError, invalid
from gossamer.api.schemas.chat import ChatMessage

#: Shorter texts are tokenized where they are: that takes less than a switch to a thread and back.
_INLINE = 1024
_THREADS = 2


class Prompts:
    """The base's tokenizer and chat template. Long texts and all templates run in worker threads.

    Args:
        context_length: tokens; longer texts are refused, the hopeless ones before they are
            tokenized.
        template_seconds: how long a rendering may take.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        context_length: int,
        template_seconds: float,
    ) -> None:
        self._tokenizer = tokenizer
        self._context_length = context_length
        self._template_seconds = template_seconds
        self._threads = anyio.CapacityLimiter(_THREADS)
        longest = max((len(piece.encode()) for piece in tokenizer.get_vocab()), default=1)
        self._most_bytes = context_length * longest

    async def encode(self, text: str, *, param: str, special: bool = True) -> tuple[int, ...]:
        """Tokens of a text; `special` lets the tokenizer add what it begins texts with.

        Raises:
            ApiError: 400, no text of that size fits the context.
        """
        # A token has at least one byte, and none is longer than the longest of the vocabulary.
        if len(text) > self._most_bytes:
            raise invalid(
                param,
                f"This model's context is {self._context_length} tokens, and the text has "
                f"{len(text)} characters.",
                code="context_length_exceeded",
            )
        run = partial(self._tokenizer.encode, text, add_special_tokens=special)
        if len(text) <= _INLINE:
            return tuple(run())
        return tuple(await anyio.to_thread.run_sync(run, limiter=self._threads))

    def decode(self, tokens: Sequence[int]) -> str:
        """The text of tokens, special ones included."""
        return str(self._tokenizer.decode(list(tokens), skip_special_tokens=False))

    async def render(self, messages: Sequence[ChatMessage], *, generate: bool = True) -> str:
        """The conversation as the base wants to read it.

        Raises:
            ApiError: 400, the base has no template, the template refuses the conversation, or it
                took too long.
        """
        if self._tokenizer.chat_template is None:
            raise invalid("messages", "The base model has no chat template; use /v1/completions.")
        render = partial(
            self._tokenizer.apply_chat_template,
            [_plain(message) for message in messages],
            tokenize=False,
            add_generation_prompt=generate,
        )
        try:
            async with asyncio.timeout(self._template_seconds):
                text = await anyio.to_thread.run_sync(
                    render, abandon_on_cancel=True, limiter=self._threads
                )
        except TimeoutError:
            raise _slow(self._template_seconds) from None
        except TemplateError as error:
            raise invalid("messages", f"The chat template refused: {error}") from error
        return str(text)


def _plain(message: ChatMessage) -> dict[str, str]:
    content = message.content
    text = content if isinstance(content, str) else "".join(part.text for part in content)
    role = "system" if message.role == "developer" else message.role
    plain = {"role": role, "content": text}
    if message.name is not None:
        plain["name"] = message.name
    return plain


def _slow(seconds: float) -> ApiError:
    return invalid("messages", f"The chat template took longer than {seconds:g} s.")
