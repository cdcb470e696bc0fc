"""Replies that are not particular to one route."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel


class ErrorDetail(BaseModel):
    """What went wrong, for people (`message`) and for programs (`code`, `param`)."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorReply(BaseModel):
    """The body of every reply from 400 on."""

    error: ErrorDetail


class CachedTokens(BaseModel):
    """Prompt tokens whose keys and values were there already."""

    cached_tokens: int


class Usage(BaseModel):
    """Tokens of the request, over all prompts and choices."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: CachedTokens


class ModelObject(BaseModel):
    """The base or an adapter, as `/v1/models` lists it. `root` is the base's own name; of a name
    that was loaded, what it was loaded from."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str
    root: str
    parent: str | None = None
    max_model_len: int


class ModelList(BaseModel):
    """All models that the key may use."""

    object: Literal["list"] = "list"
    data: list[ModelObject]


class Deleted(BaseModel):
    """What was deleted."""

    id: str
    object: str
    deleted: Literal[True] = True


class Tokenized(BaseModel):
    """vLLM's reply of `/tokenize`."""

    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | None = None


class Detokenized(BaseModel):
    """vLLM's reply of `/detokenize`."""

    prompt: str


class Version(BaseModel):
    """`/version`."""

    version: str
    base: str
    base_fingerprint: str


class HealthReply(BaseModel):
    """`status` is `ok` or the reason why not."""

    status: str
