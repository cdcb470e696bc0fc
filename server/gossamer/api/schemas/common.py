"""What every request's schema shares, and the fields of sampling."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

#: A stop string of L characters costs up to L² comparisons a token, in the engine's thread.
STOP_CHARACTERS = 1024
INT64 = 2**63

Text = Annotated[str, Field(min_length=1)]
TokenId = Annotated[int, Field(ge=0)]
StopString = Annotated[str, Field(min_length=1, max_length=STOP_CHARACTERS)]


class RequestModel(BaseModel):
    """Strict (no "3" for 3), closed (no unknown field), finite; its errors do not repeat values."""

    model_config = ConfigDict(
        extra="forbid",
        strict=True,
        frozen=True,
        allow_inf_nan=False,
        hide_input_in_errors=True,
    )


class StreamOptions(RequestModel):
    """`include_usage` adds a last chunk with the usage; `include_obfuscation` has no effect."""

    include_usage: bool = False
    include_obfuscation: bool | None = None


class MergedAdapters(RequestModel):
    """LoRAX's way to name a mix in the body.

    `ids` are named as in `model`; `weights` default to 1 each. Every other field is a parameter of
    the merge method (`lambda`, `normalize`, …); one that the method does not have is refused.
    """

    model_config = ConfigDict(extra="allow")

    ids: Annotated[list[Text], Field(min_length=1)]
    weights: list[float] | None = None
    merge_strategy: Text = "linear"


class StructuredOutputs(RequestModel):
    """What the text must match: exactly one of the four (vLLM's field)."""

    json_: dict[str, Any] | str | None = Field(
        default=None, alias="json", description="A JSON schema, or its text."
    )
    regex: Text | None = None
    choice: Annotated[list[Text], Field(min_length=1)] | None = None
    grammar: Text | None = Field(default=None, description="A Lark grammar.")


class SamplingFields(RequestModel):
    """The fields that completions and chat completions share."""

    model: Text = Field(
        description="`base`, an adapter (`sql`, `sql:3`, `sql@sha256:…`), "
        "or a weighted mix (`sql*0.7+math*0.3`)."
    )
    merged_adapters: MergedAdapters | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    n: Annotated[int, Field(ge=1)] | None = None
    max_tokens: Annotated[int, Field(ge=0)] | None = None
    min_tokens: Annotated[int, Field(ge=0)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=-1, lt=INT64)] | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    repetition_penalty: Annotated[float, Field(gt=0, le=10)] | None = None
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    seed: Annotated[int, Field(ge=-INT64, lt=INT64)] | None = None
    stop: StopString | list[StopString] | None = None
    stop_token_ids: list[TokenId] | None = None
    include_stop_str_in_output: bool | None = None
    ignore_eos: bool | None = None
    skip_special_tokens: bool | None = None
    logit_bias: dict[str, Annotated[float, Field(ge=-100, le=100)]] | None = None
    allowed_token_ids: Annotated[list[TokenId], Field(min_length=1)] | None = None
    structured_outputs: StructuredOutputs | None = None
    return_token_ids: bool | None = None
    priority: Annotated[int, Field(ge=0, le=100)] | None = Field(
        default=None, description="0 is the most urgent; it orders waiting requests."
    )
    # Accepted without effect: unmodified clients send them.
    user: str | None = None
    metadata: dict[str, str] | None = None
    store: Literal[False] | None = None
    service_tier: Literal["auto"] | None = None
