"""The replies of chat completions: all at once, or as events."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from json.encoder import encode_basestring_ascii
from typing import Any

from gossamer.api.generation import Usage
from gossamer.api.tokens import TokenText
from gossamer.engine.messages import ChoiceEnd, Chunk, Message, TokenLogprob


@dataclass(frozen=True)
class ChatFrame:
    """What every chunk and the reply of one request have in common.

    `logprobs` and `token_ids` tell whether these were asked for; `prompt` is the prompt's tokens.
    """

    id: str
    created: int
    model: str
    choices: int
    tokens: TokenText
    prompt: tuple[int, ...]
    logprobs: bool = False
    token_ids: bool = False

    def head(self, kind: str) -> dict[str, Any]:
        """The fields before the choices."""
        return {"id": self.id, "object": kind, "created": self.created, "model": self.model}

    def logprob(self, scored: TokenLogprob) -> dict[str, Any]:
        """A token of the content, as OpenAI shows it."""
        return self._one(scored.token, scored.logprob) | {
            "top_logprobs": [self._one(token, value) for token, value in scored.top]
        }

    def _one(self, token: int, logprob: float) -> dict[str, Any]:
        raw = self.tokens.bytes(token)
        return {"token": self.tokens.text(token), "logprob": logprob, "bytes": list(raw)}


class ChatEvents:
    """Messages → `chat.completion.chunk` events.

    The text of a chunk is the only part that changes from token to token; the rest is encoded once
    for each choice.
    """

    def __init__(self, frame: ChatFrame, *, include_usage: bool) -> None:
        self._frame = frame
        self._include_usage = include_usage
        self._head = json.dumps(frame.head("chat.completion.chunk"))[:-1]
        self._begun = False
        self._before = [
            f'data: {self._head},"choices":[{{"index":{index},"delta":{{"content":'
            for index in range(frame.choices)
        ]

    def encode(self, messages: Iterable[tuple[int, Message]]) -> str:
        """The events; before the first of them the role of every choice."""
        events: list[str] = []
        if not self._begun:
            self._begun = True
            events.extend(self._role(index) for index in range(self._frame.choices))
        for _, message in messages:
            if isinstance(message, Chunk):
                if message.text or self._frame.logprobs or self._frame.token_ids:
                    events.append(self._content(message))
            elif isinstance(message, ChoiceEnd):
                events.append(self._end(message))
        return "".join(events)

    def finish(self, usage: Usage) -> str:
        """The usage, if it was asked for."""
        if not self._include_usage:
            return ""
        return f'data: {self._head},"choices":[],"usage":{json.dumps(usage.content())}}}\n\n'

    def _role(self, index: int) -> str:
        prompt = ""
        if self._frame.token_ids and index == 0:
            prompt = f',"prompt_token_ids":{list(self._frame.prompt)}'
        return self._choice(index, '{"role":"assistant","content":""}', "null", prompt)

    def _content(self, chunk: Chunk) -> str:
        text = encode_basestring_ascii(chunk.text)
        logprobs = "null"
        if self._frame.logprobs:
            content = [self._frame.logprob(scored) for scored in chunk.logprobs]
            logprobs = json.dumps({"content": content, "refusal": None})
        ids = f',"token_ids":{list(chunk.token_ids)}' if self._frame.token_ids else ""
        return (
            f'{self._before[chunk.index]}{text}}},"logprobs":{logprobs},"finish_reason":null{ids}'
            "}]}\n\n"
        )

    def _end(self, end: ChoiceEnd) -> str:
        matched = f',"stop_reason":{json.dumps(end.matched)}' if end.matched is not None else ""
        return self._choice(end.index, "{}", f'"{end.reason}"{matched}')

    def _choice(self, index: int, delta: str, reason: str, more: str = "") -> str:
        return (
            f'data: {self._head},"choices":[{{"index":{index},"delta":{delta},'
            f'"finish_reason":{reason}}}]{more}}}\n\n'
        )


@dataclass
class _Answer:
    text: list[str] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[dict[str, Any]] = field(default_factory=list)
    end: ChoiceEnd | None = None


class ChatReply:
    """Messages → one `chat.completion`."""

    def __init__(self, frame: ChatFrame) -> None:
        self._frame = frame
        self._answers = [_Answer() for _ in range(frame.choices)]

    def add(self, messages: Iterable[tuple[int, Message]]) -> None:
        """Take messages in."""
        for _, message in messages:
            if isinstance(message, Chunk):
                answer = self._answers[message.index]
                answer.text.append(message.text)
                answer.token_ids.extend(message.token_ids)
                if self._frame.logprobs:
                    answer.logprobs.extend(self._frame.logprob(s) for s in message.logprobs)
            elif isinstance(message, ChoiceEnd):
                self._answers[message.index].end = message

    def content(self, usage: Usage) -> dict[str, Any]:
        """The reply's JSON object."""
        reply = self._frame.head("chat.completion")
        reply["choices"] = [self._choice(i, answer) for i, answer in enumerate(self._answers)]
        reply["usage"] = usage.content()
        if self._frame.token_ids:
            reply["prompt_token_ids"] = list(self._frame.prompt)
        return reply

    def _choice(self, index: int, answer: _Answer) -> dict[str, Any]:
        logprobs = {"content": answer.logprobs, "refusal": None} if self._frame.logprobs else None
        choice: dict[str, Any] = {
            "index": index,
            "message": {"role": "assistant", "content": "".join(answer.text), "refusal": None},
            "logprobs": logprobs,
            "finish_reason": answer.end.reason if answer.end else None,
        }
        if answer.end is not None and answer.end.matched is not None:
            choice["stop_reason"] = answer.end.matched
        if self._frame.token_ids:
            choice["token_ids"] = answer.token_ids
        return choice
