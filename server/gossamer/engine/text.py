"""From tokens to text: incremental decoding, and stop strings wherever their tokens begin."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

#: Prompt tokens kept as context, so that a tokenizer that merges spaces decodes as in the middle
#: of a text.
_CONTEXT = 6

#: Tokens after which an incomplete character is given out as it is: none takes more bytes, and
#: without an end every step would decode the whole run again.
_LONGEST_CHARACTER = 8


class Decoder(Protocol):
    """The part of a tokenizer that text needs."""

    def decode(self, token_ids: list[int], *, skip_special_tokens: bool) -> str:
        """The text of the tokens."""


class TokenizerDecoder:
    """A transformers tokenizer as a `Decoder`: exactly the tokens' text, nothing cleaned up."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer

    def decode(self, token_ids: list[int], *, skip_special_tokens: bool) -> str:
        """The text of the tokens."""
        text = self._tokenizer.decode(
            token_ids,
            skip_special_tokens=skip_special_tokens,
            clean_up_tokenization_spaces=False,
        )
        return str(text)


@dataclass(eq=False)
class TextStream:
    """The text of one choice, given out as soon as it is certain.

    Held back: bytes that are not yet a whole character, and an end that might become a stop string.

    Source: the two-offset decoding of text-generation-inference and vLLM.
    """

    decoder: Decoder
    prompt: tuple[int, ...]
    skip_special_tokens: bool
    stop: tuple[str, ...] = ()
    include_stop: bool = False
    _ids: list[int] = field(default_factory=list)
    _prefix: int = 0
    _read: int = 0
    _held: str = ""

    def __post_init__(self) -> None:
        self._ids = list(self.prompt[-_CONTEXT:])
        self._read = len(self._ids)

    def push(self, token: int, *, may_stop: bool = True) -> tuple[str, str | None]:
        """Add a token. Returns (new certain text, the stop string that ended it or None).

        While `may_stop` is false (before min_tokens) stop strings are ordinary text.
        """
        self._ids.append(token)
        self._held += self._decode(final=False)
        if may_stop:
            return self._cut()
        certain, self._held = self._held, ""
        return certain, None

    def finish(self) -> tuple[str, str | None]:
        """The rest of the text, and the stop string in it: nothing more will come."""
        self._held += self._decode(final=True)
        text, stop = self._cut()
        text, self._held = text + self._held, ""
        return text, stop

    def _decode(self, *, final: bool) -> str:
        skip = self.skip_special_tokens
        before = self.decoder.decode(self._ids[self._prefix : self._read], skip_special_tokens=skip)
        after = self.decoder.decode(self._ids[self._prefix :], skip_special_tokens=skip)
        waiting = len(self._ids) - self._read < _LONGEST_CHARACTER and not final
        if len(after) <= len(before) or (after.endswith("\ufffd") and waiting):
            return ""
        self._prefix, self._read = self._read, len(self._ids)
        return after[len(before) :]

    def _cut(self) -> tuple[str, str | None]:
        text = self._held
        found = [(at, stop) for stop in self.stop if (at := text.find(stop)) >= 0]
        if found:
            at, stop = min(found)
            self._held = ""
            return text[: at + len(stop)] if self.include_stop else text[:at], stop
        keep = max((_overlap(text, stop) for stop in self.stop), default=0)
        certain = text[: len(text) - keep]
        self._held = text[len(text) - keep :]
        return certain, None


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that begins `stop`."""
    longest = min(len(text), len(stop) - 1)
    return next((n for n in range(longest, 0, -1) if text.endswith(stop[:n])), 0)
