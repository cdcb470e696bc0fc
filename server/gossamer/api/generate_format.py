"""LoRAX's requests in the words of a completion, and its replies: all at once, or as events."""

from __future__ import annotations

import codecs
import secrets
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from pydantic import TypeAdapter, ValidationError
from starlette.responses import Response
from starlette.types import Message as Sent
from starlette.types import Receive, Scope, Send

from gossamer.api.errors import ApiError, invalid
from gossamer.api.generation import Usage
from gossamer.api.schemas.chat import ChatMessage
from gossamer.api.schemas.common import MergedAdapters, SamplingFields, StructuredOutputs
from gossamer.api.schemas.compatibility import GenerateParameters
from gossamer.api.streaming import DONE, event
from gossamer.api.tokens import TokenText
from gossamer.engine.messages import ChoiceEnd, Chunk, Message, PromptScored
from gossamer.merge.methods import METHODS
from gossamer.store.catalog.names import BASE

_MESSAGES = TypeAdapter(list[ChatMessage])


def sampling_fields(given: GenerateParameters, *, stream: bool) -> SamplingFields:
    """What the parameters are in a completion. Tokens that are drawn always get a seed.

    Raises:
        ApiError: 400, two of them contradict each other.
    """
    if given.adapter_id is not None and given.merged_adapters is not None:
        raise invalid("merged_adapters", "Give either `adapter_id` or `merged_adapters`.")
    if given.decoder_input_details and stream:
        raise invalid("decoder_input_details", "A stream has no details of the prompt's tokens.")
    drawn = given.temperature != 0 and bool(
        given.do_sample
        or given.temperature is not None
        or given.top_k
        or (given.top_p is not None and given.top_p < 1)
    )
    seed = None
    if drawn:  # told in the details, so that the same text can be had again
        seed = given.seed if given.seed is not None else secrets.randbits(32)
    return SamplingFields(
        model=BASE if given.adapter_id is None else given.adapter_id,
        merged_adapters=_merge(given),
        stream=stream,
        temperature=(given.temperature or 1.0) if drawn else 0.0,
        top_k=given.top_k,
        top_p=given.top_p,
        repetition_penalty=given.repetition_penalty,
        seed=seed,
        stop=given.stop or None,
        include_stop_str_in_output=True,
        ignore_eos=given.ignore_eos_token,
        structured_outputs=_structure(given),
    )


def _merge(given: GenerateParameters) -> MergedAdapters | None:
    if given.merged_adapters is None:
        return None
    values = given.merged_adapters.model_dump(exclude_none=True)
    method = METHODS.get(values.get("merge_strategy", "linear"))
    known = {parameter.name for parameter in method.parameters} if method is not None else set()
    # LoRAX's client always sends a density. 1 keeps everything, as a method without one does.
    if method is not None and "density" not in known and values.get("density") == 1:
        del values["density"]
    return MergedAdapters.model_validate(values)


def _structure(given: GenerateParameters) -> StructuredOutputs | None:
    if given.response_format is None:
        return None
    schema = given.response_format.schema_
    return StructuredOutputs(json={"type": "object"} if schema is None else schema)


def messages_of(inputs: str) -> list[ChatMessage]:
    """The conversation that `apply_chat_template` finds in `inputs`.

    Raises:
        ApiError: 400, there is none.
    """
    try:
        messages = _MESSAGES.validate_json(inputs)
    except ValidationError:
        messages = []
    if not messages:
        what = "With apply_chat_template, inputs is the JSON of a list of messages."
        raise invalid("inputs", what)
    return messages


#: what an error of a completion calls a field → what it is called here
_SPELLED: dict[str, str] = {
    "max_tokens": "parameters.max_new_tokens",
    "structured_outputs": "parameters.response_format",
    "inputs": "inputs",
    "messages": "inputs",
}


def respelled(error: ApiError, given: GenerateParameters) -> ApiError:
    """The error with its field as this request spells it."""
    param = error.param or ""
    field = param.partition(".")[0]
    if field == "model":
        merged = given.merged_adapters is not None
        spelled = "parameters.merged_adapters.ids" if merged else "parameters.adapter_id"
    else:
        spelled = _SPELLED.get(field, f"parameters.{param}")
    return ApiError(
        error.status_code,
        error.message,
        type=error.type,
        code=error.code,
        param=spelled,
        headers=error.headers,
    )


@dataclass(frozen=True)
class GenerateFrame:
    """What the events or the reply of one request need beside its messages.

    Attributes:
        prompt: its tokens.
        before: what the generated text begins with: the prompt's text, or nothing.
        seed: what the tokens were drawn with; None when they were not drawn.
        details: whether they were asked for.
    """

    tokens: TokenText
    prompt: tuple[int, ...]
    before: str = ""
    seed: int | None = None
    details: bool = False

    def summary(self, end: ChoiceEnd | None, usage: Usage) -> dict[str, Any]:
        """The details that a stream has too."""
        return {
            "finish_reason": _reason(end),
            "prompt_tokens": usage.prompt,
            "generated_tokens": usage.completion,
            "seed": self.seed,
        }


def _reason(end: ChoiceEnd | None) -> str:
    if end is None or end.reason == "length":
        return "length"
    return "stop_sequence" if isinstance(end.matched, str) else "eos_token"


@dataclass
class _Text:
    """The text so far, and its tokens as LoRAX shows them.

    The bytes of a character that is not whole yet wait for the token that completes it.
    """

    tokens: TokenText
    _parts: list[str] = field(default_factory=list)
    _decoder: codecs.IncrementalDecoder = field(
        default_factory=lambda: codecs.getincrementaldecoder("utf-8")("replace")
    )

    def add(self, chunk: Chunk) -> list[dict[str, Any]]:
        """Take a chunk in; its tokens."""
        self._parts.append(chunk.text)
        return [self._token(scored.token, scored.logprob) for scored in chunk.logprobs]

    @property
    def is_open(self) -> bool:
        """Whether bytes wait: then they are of the last token that is not special."""
        return bool(self._decoder.getstate()[0])

    def end(self, tokens: Sequence[dict[str, Any]]) -> None:
        """Nothing more will come: what still waits belongs to the last of the tokens that is not
        special."""
        if self.is_open:
            last = next(token for token in reversed(tokens) if not token["special"])
            last["text"] += self._decoder.decode(b"", final=True)

    def __str__(self) -> str:
        return "".join(self._parts)

    def _token(self, token: int, logprob: float) -> dict[str, Any]:
        special = self.tokens.is_special(token)
        raw = self.tokens.bytes(token)
        text = self.tokens.text(token) if special else self._decoder.decode(raw)
        return {"id": token, "text": text, "logprob": logprob, "special": special}


class GenerateEvents:
    """Messages → one event for each token.

    The last token's event also tells the whole text, and only what follows a token shows whether it
    was the last: every event waits for the next message. So does that of a token with a part of a
    character, for one that completes it: behind it there may be special ones only.
    """

    def __init__(self, frame: GenerateFrame) -> None:
        self._frame = frame
        self._text = _Text(frame.tokens)
        self._held: list[dict[str, Any]] = []
        self._end: ChoiceEnd | None = None

    def encode(self, messages: Iterable[tuple[int, Message]]) -> str:
        """The events of all tokens but the newest, or but those from an open character on."""
        for _, message in messages:
            if isinstance(message, Chunk):
                self._held.extend(self._text.add(message))
            elif isinstance(message, ChoiceEnd):
                self._end = message
        keep = len(self._held) - 1
        if self._text.is_open:
            keep = max(i for i, token in enumerate(self._held) if not token["special"])
        sent, self._held = self._held[: max(keep, 0)], self._held[max(keep, 0) :]
        return "".join(_event(token) for token in sent)

    def finish(self, usage: Usage) -> str:
        """The last token's event, and those that waited with it."""
        self._text.end(self._held)
        *before, last = self._held
        details = self._frame.summary(self._end, usage) if self._frame.details else None
        final = _event(last, self._frame.before + str(self._text), details)
        return "".join(map(_event, before)) + final


def _event(
    token: dict[str, Any], text: str | None = None, details: dict[str, Any] | None = None
) -> str:
    return event({"token": token, "generated_text": text, "details": details})


class GenerateReply:
    """Messages → one object."""

    def __init__(self, frame: GenerateFrame) -> None:
        self._frame = frame
        self._text = _Text(frame.tokens)
        self._tokens: list[dict[str, Any]] = []
        self._prefill: list[dict[str, Any]] = []
        self._end: ChoiceEnd | None = None

    def add(self, messages: Iterable[tuple[int, Message]]) -> None:
        """Take messages in."""
        for _, message in messages:
            if isinstance(message, Chunk):
                self._tokens.extend(self._text.add(message))
            elif isinstance(message, PromptScored):
                self._prefill = self._scored(message)
            elif isinstance(message, ChoiceEnd):
                self._end = message

    def content(self, usage: Usage) -> dict[str, Any]:
        """The reply's JSON object."""
        reply: dict[str, Any] = {"generated_text": self._frame.before + str(self._text)}
        if self._frame.details:
            self._text.end(self._tokens)
            reply["details"] = self._frame.summary(self._end, usage) | {
                "prefill": self._prefill,
                "tokens": self._tokens,
            }
        return reply

    def _scored(self, scores: PromptScored) -> list[dict[str, Any]]:
        text = self._frame.tokens.text
        return [
            {"id": token, "text": text(token), "logprob": scored.logprob if scored else None}
            for token, scored in zip(self._frame.prompt, scores.tokens, strict=True)
        ]


class WithoutDone(Response):
    """A stream without its `[DONE]`: LoRAX's client reads every event as JSON."""

    def __init__(self, stream: Response) -> None:
        self.status_code = stream.status_code
        self.background = None
        self.raw_headers = stream.raw_headers
        self._stream = stream

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the stream."""

        async def send_rest(message: Sent) -> None:
            if message["type"] == "http.response.body":
                message["body"] = message["body"].removesuffix(DONE)
            await send(message)

        await self._stream(scope, receive, send_rest)
