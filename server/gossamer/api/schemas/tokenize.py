"""`POST /tokenize` and `POST /detokenize`, in vLLM's shapes."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from gossamer.api.schemas.chat import ChatMessage
from gossamer.api.schemas.common import RequestModel, Text, TokenId


class TokenizeRequest(RequestModel):
    """A text (`prompt`) or a conversation (`messages`)."""

    model: Text | None = None
    prompt: str | None = None
    messages: Annotated[list[ChatMessage], Field(min_length=1)] | None = None
    add_special_tokens: bool | None = None
    add_generation_prompt: bool = True
    return_token_strs: bool | None = None


class DetokenizeRequest(RequestModel):
    """Tokens to be read as text."""

    model: Text | None = None
    tokens: list[TokenId]
