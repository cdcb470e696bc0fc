"""`POST /v1/chat/completions`."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, Discriminator, Field, Tag

from gossamer.api.schemas.common import RequestModel, SamplingFields, Text
from gossamer.api.schemas.replies import Usage


class TextPart(RequestModel):
    """A part of a message's content. The base reads text only."""

    type: Literal["text"]
    text: str


def _kind_of_content(value: Any) -> str:
    """Which of the two forms it is, so that an error is about the form that was meant."""
    return "parts" if isinstance(value, list) else "text"


Content = Annotated[
    Annotated[str, Tag("text")] | Annotated[list[TextPart], Tag("parts")],
    Discriminator(_kind_of_content),
]


class ChatMessage(RequestModel):
    """A message of the conversation. `developer` is rendered as `system`."""

    role: Literal["system", "developer", "user", "assistant"]
    content: Content
    name: Text | None = None


class JsonSchema(RequestModel):
    """`json_schema` of a response format. The text always follows the schema, strict or not."""

    name: Annotated[str, Field(min_length=1, max_length=64)]
    description: str | None = None
    schema_: dict[str, Any] | None = Field(default=None, alias="schema")
    strict: bool | None = None


class ResponseFormat(RequestModel):
    """OpenAI's `response_format`."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None


class ChatRequest(SamplingFields):
    """A conversation to continue with one message of the assistant."""

    messages: Annotated[list[ChatMessage], Field(min_length=1)]
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    response_format: ResponseFormat | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0)] | None = None
    parallel_tool_calls: bool | None = None


class TokenLogprobReply(BaseModel):
    """One of the likeliest tokens at a position."""

    token: str
    logprob: float
    bytes: list[int] | None


class ChosenLogprob(TokenLogprobReply):
    """The token of the text, and the alternatives."""

    top_logprobs: list[TokenLogprobReply]


class ChatLogprobs(BaseModel):
    """One entry a token of the content."""

    content: list[ChosenLogprob]
    refusal: None = None


class AssistantMessage(BaseModel):
    """What the model said."""

    role: Literal["assistant"]
    content: str
    refusal: None = None


class ChatChoice(BaseModel):
    """One answer of `n`."""

    index: int
    message: AssistantMessage
    logprobs: ChatLogprobs | None
    finish_reason: Literal["stop", "length"]
    stop_reason: str | int | None = None
    token_ids: list[int] | None = None


class ChatCompletion(BaseModel):
    """The reply."""

    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage
    prompt_token_ids: list[int] | None = None
