"""The replies of completions: all at once, or as events."""

from __future__ import annotations

import codecs
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from json.encoder import encode_basestring_ascii
from typing import Any

from gossamer.api.generation import Usage
from gossamer.api.tokens import TokenText
from gossamer.engine.messages import ChoiceEnd, Chunk, Message, PromptScored, TokenLogprob


@dataclass(frozen=True)
class Prompt:
    """One prompt: its text, as it is echoed, and its tokens."""

    text: str
    tokens: tuple[int, ...]


@dataclass(frozen=True)
class CompletionFrame:
    """What every chunk and the reply of one request have in common.

    `per_prompt` is `n`; choice `i` of prompt `p` has index p × n + i.
    """

    id: str
    created: int
    model: str
    prompts: Sequence[Prompt]
    per_prompt: int
    tokens: TokenText
    echo: bool = False
    logprobs: bool = False
    token_ids: bool = False

    @property
    def choices(self) -> int:
        """Choices of all prompts."""
        return len(self.prompts) * self.per_prompt

    def head(self) -> dict[str, Any]:
        """The fields before the choices."""
        return {
            "id": self.id,
            "object": "text_completion",
            "created": self.created,
            "model": self.model,
        }

    def of(self, index: int) -> Prompt:
        """The prompt of a choice."""
        return self.prompts[index // self.per_prompt]

    def siblings(self, prompt: int) -> range:
        """The choices of a prompt."""
        return range(prompt * self.per_prompt, (prompt + 1) * self.per_prompt)


@dataclass
class ScoredText:
    """The four lists of log-probabilities of one choice, with the place in its text."""

    _tokens: TokenText
    _offset: int = 0
    _decoder: codecs.IncrementalDecoder = field(
        default_factory=lambda: codecs.getincrementaldecoder("utf-8")("replace")
    )

    def prompt(self, ids: Sequence[int], scores: PromptScored) -> dict[str, list[Any]]:
        """The lists for a prompt that is echoed; its first token has no log-probability."""
        return self._lists(zip(ids, scores.tokens, strict=True))

    def chunk(self, chunk: Chunk) -> dict[str, list[Any]]:
        """The lists for new tokens."""
        return self._lists((scored.token, scored) for scored in chunk.logprobs)

    def _lists(self, entries: Iterable[tuple[int, TokenLogprob | None]]) -> dict[str, list[Any]]:
        lists: dict[str, list[Any]] = {
            "tokens": [],
            "token_logprobs": [],
            "top_logprobs": [],
            "text_offset": [],
        }
        for token, scored in entries:
            lists["tokens"].append(self._tokens.label(token))
            lists["token_logprobs"].append(scored.logprob if scored else None)
            lists["top_logprobs"].append(self._alternatives(scored) if scored else None)
            lists["text_offset"].append(self._offset)
            if not self._tokens.is_special(token):
                self._offset += len(self._decoder.decode(self._tokens.bytes(token)))
        return lists

    def _alternatives(self, scored: TokenLogprob) -> dict[str, float]:
        """The likeliest, and always the chosen one. Of two tokens of one text the likelier."""
        found: dict[str, float] = {}
        for token, logprob in sorted(
            {*scored.top, (scored.token, scored.logprob)}, key=lambda pair: -pair[1]
        ):
            found.setdefault(self._tokens.label(token), logprob)
        return found


class CompletionEvents:
    """Messages → `text_completion` events, each with the new text of one choice."""

    def __init__(self, frame: CompletionFrame, *, include_usage: bool) -> None:
        self._frame = frame
        self._include_usage = include_usage
        self._head = json.dumps(frame.head())[:-1]
        self._begun: set[int] = set()
        self._before = [
            f'data: {self._head},"choices":[{{"index":{index},"text":'
            for index in range(frame.choices)
        ]
        self._scored = [ScoredText(frame.tokens) for _ in range(frame.choices)]

    def encode(self, messages: Iterable[tuple[int, Message]]) -> str:
        """The events; a choice's first one begins with the prompt if that is echoed."""
        return "".join(
            event for prompt, message in messages for event in self._events(prompt, message)
        )

    def finish(self, usage: Usage) -> str:
        """The usage, if it was asked for."""
        if not self._include_usage:
            return ""
        return f'data: {self._head},"choices":[],"usage":{json.dumps(usage.content())}}}\n\n'

    def _events(self, prompt: int, message: Message) -> Iterator[str]:
        frame = self._frame
        if prompt not in self._begun and not (frame.echo and frame.logprobs):
            self._begun.add(prompt)
            yield from self._opening(prompt, None)
        if isinstance(message, PromptScored) and frame.echo:
            self._begun.add(prompt)
            yield from self._opening(prompt, message)
        elif isinstance(message, Chunk):
            if message.text or frame.logprobs or frame.token_ids:
                yield self._content(prompt, message)
        elif isinstance(message, ChoiceEnd):
            matched = (
                f',"stop_reason":{json.dumps(message.matched)}'
                if message.matched is not None
                else ""
            )
            index = prompt * frame.per_prompt + message.index
            yield self._event(index, "", "null", f'"{message.reason}"{matched}')

    def _opening(self, prompt: int, scores: PromptScored | None) -> Iterator[str]:
        """The echo of a prompt, and its tokens, for each of its choices."""
        frame = self._frame
        if not (frame.echo or frame.token_ids):
            return
        given = frame.prompts[prompt]
        for index in frame.siblings(prompt):
            logprobs = "null"
            if scores is not None:
                logprobs = json.dumps(self._scored[index].prompt(given.tokens, scores))
            ids = f',"prompt_token_ids":{list(given.tokens)}' if frame.token_ids else ""
            yield self._event(index, given.text if frame.echo else "", logprobs, f"null{ids}")

    def _content(self, prompt: int, chunk: Chunk) -> str:
        index = prompt * self._frame.per_prompt + chunk.index
        logprobs = "null"
        if self._frame.logprobs:
            logprobs = json.dumps(self._scored[index].chunk(chunk))
        ids = f',"token_ids":{list(chunk.token_ids)}' if self._frame.token_ids else ""
        return self._event(index, chunk.text, logprobs, f"null{ids}")

    def _event(self, index: int, text: str, logprobs: str, reason: str) -> str:
        return (
            f"{self._before[index]}{encode_basestring_ascii(text)},"
            f'"logprobs":{logprobs},"finish_reason":{reason}}}]}}\n\n'
        )


@dataclass
class _Answer:
    scored: ScoredText
    text: list[str] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)
    logprobs: dict[str, list[Any]] = field(default_factory=dict)
    end: ChoiceEnd | None = None

    def extend(self, lists: dict[str, list[Any]]) -> None:
        for name, values in lists.items():
            self.logprobs.setdefault(name, []).extend(values)


class CompletionReply:
    """Messages → one `text_completion`."""

    def __init__(self, frame: CompletionFrame) -> None:
        self._frame = frame
        self._answers = [_Answer(ScoredText(frame.tokens)) for _ in range(frame.choices)]

    def add(self, messages: Iterable[tuple[int, Message]]) -> None:
        """Take messages in."""
        for prompt, message in messages:
            if isinstance(message, PromptScored):
                self._add_prompt(prompt, message)
            elif isinstance(message, Chunk):
                answer = self._answers[prompt * self._frame.per_prompt + message.index]
                answer.text.append(message.text)
                answer.token_ids.extend(message.token_ids)
                if self._frame.logprobs:
                    answer.extend(answer.scored.chunk(message))
            elif isinstance(message, ChoiceEnd):
                self._answers[prompt * self._frame.per_prompt + message.index].end = message

    def content(self, usage: Usage) -> dict[str, Any]:
        """The reply's JSON object."""
        choices = [self._choice(index, answer) for index, answer in enumerate(self._answers)]
        return self._frame.head() | {"choices": choices, "usage": usage.content()}

    def _add_prompt(self, prompt: int, scores: PromptScored) -> None:
        if self._frame.echo and self._frame.logprobs:
            tokens = self._frame.prompts[prompt].tokens
            for index in self._frame.siblings(prompt):
                answer = self._answers[index]
                answer.extend(answer.scored.prompt(tokens, scores))

    def _choice(self, index: int, answer: _Answer) -> dict[str, Any]:
        prompt = self._frame.of(index)
        text = "".join(answer.text)
        choice: dict[str, Any] = {
            "index": index,
            "text": prompt.text + text if self._frame.echo else text,
            "logprobs": answer.logprobs or None,
            "finish_reason": answer.end.reason if answer.end else None,
        }
        if answer.end is not None and answer.end.matched is not None:
            choice["stop_reason"] = answer.end.matched
        if self._frame.token_ids:
            choice["token_ids"] = answer.token_ids
            choice["prompt_token_ids"] = list(prompt.tokens)
        return choice
