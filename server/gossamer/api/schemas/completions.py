"""`POST /v1/completions`."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, Discriminator, Field, Tag

from gossamer.api.schemas.common import SamplingFields, Text, TokenId
from gossamer.api.schemas.replies import Usage


def _kind_of_prompt(value: Any) -> str:
    """Which of the four forms it is, by its first element; trying all would cost four passes."""
    if not isinstance(value, list):
        return "text"
    first = value[0] if value else ""
    if isinstance(first, list):
        return "token lists"
    return "tokens" if isinstance(first, int | float) else "texts"


Tokens = Annotated[list[TokenId], Field(min_length=1)]
Prompt = Annotated[
    Annotated[str, Tag("text")]
    | Annotated[list[str], Field(min_length=1), Tag("texts")]
    | Annotated[Tokens, Tag("tokens")]
    | Annotated[list[Tokens], Field(min_length=1), Tag("token lists")],
    Discriminator(_kind_of_prompt),
]


class CompletionRequest(SamplingFields):
    """A text or tokens to continue; several are answered in one reply."""

    prompt: Prompt
    echo: bool | None = None
    logprobs: Annotated[int, Field(ge=0)] | None = None
    best_of: Literal[1] | None = Field(default=None, description="Only 1 is offered.")


class CompletionLogprobs(BaseModel):
    """Four lists of one entry a token. `text_offset` counts characters of the returned text."""

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None] | None
    text_offset: list[int]


class CompletionChoice(BaseModel):
    """One continuation of one prompt; `index` is prompt × n + choice."""

    text: str
    index: int
    logprobs: CompletionLogprobs | None
    finish_reason: Literal["stop", "length"]
    stop_reason: str | int | None = None
    token_ids: list[int] | None = None
    prompt_token_ids: list[int] | None = None


class Completion(BaseModel):
    """The reply."""

    id: str
    object: Literal["text_completion"]
    created: int
    model: Text
    choices: list[CompletionChoice]
    usage: Usage
