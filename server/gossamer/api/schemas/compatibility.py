"""The routes that vLLM's and LoRAX's clients know: their bodies and replies."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from gossamer.api.schemas.common import INT64, RequestModel, StopString, Text
from gossamer.store.catalog.names import MAX_NAME

LoadedName = Annotated[str, Field(min_length=1, max_length=MAX_NAME)]


class LoadAdapter(RequestModel):
    """vLLM's request to know a stored adapter under one more name."""

    lora_name: LoadedName
    lora_path: Text = Field(
        description="A stored adapter (`sql`, `sql:3`, `sql@sha256:…`), never a path of a file."
    )
    load_inplace: bool | None = Field(
        default=None, description="Replaces what was loaded under the name; never an adapter."
    )
    base_model_name: Text | None = Field(default=None, description="The base: no other is served.")
    lora_int_id: int | None = Field(default=None, description="Without effect.")


class UnloadAdapter(RequestModel):
    """vLLM's request to forget such a name."""

    lora_name: LoadedName
    lora_int_id: int | None = Field(default=None, description="Without effect.")


class GenerateMerge(RequestModel):
    """LoRAX's `merged_adapters`, whose client sends null for what was not said.

    Every other field is a parameter of the merge method, as in completions.
    """

    model_config = ConfigDict(extra="allow")

    ids: Annotated[list[Text], Field(min_length=1)]
    weights: list[float] | None = None
    merge_strategy: Text | None = None
    density: float | None = None
    majority_sign_method: Text | None = None


class GenerateFormat(RequestModel):
    """LoRAX's `response_format`; without a schema, any JSON object."""

    type: Literal["json_object"]
    schema_: dict[str, Any] | None = Field(default=None, alias="schema")


class GenerateParameters(RequestModel):
    """LoRAX's `parameters`. Those from `best_of` on take only the values that change nothing."""

    adapter_id: Text | None = Field(
        default=None, description="As `model` of a completion; the base when it is not given."
    )
    adapter_source: Literal["local"] | None = None
    merged_adapters: GenerateMerge | None = None
    do_sample: bool | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_k: Annotated[int, Field(ge=0, lt=INT64)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    repetition_penalty: Annotated[float, Field(gt=0, le=10)] | None = None
    seed: Annotated[int, Field(ge=0, lt=INT64)] | None = None
    max_new_tokens: Annotated[int, Field(ge=1)] | None = Field(default=None, description="20.")
    ignore_eos_token: bool | None = None
    stop: list[StopString] | None = None
    response_format: GenerateFormat | None = None
    details: bool | None = None
    decoder_input_details: bool | None = Field(
        default=None, description="Log-probabilities of the prompt; not in a stream."
    )
    return_full_text: bool | None = None
    apply_chat_template: bool | None = Field(
        default=None, description="`inputs` is then the JSON of a list of messages."
    )
    best_of: Literal[1] | None = None
    return_k_alternatives: Literal[0] | None = None
    truncate: None = None
    typical_p: Annotated[float, Field(ge=1, le=1)] | None = None
    watermark: Literal[False] | None = None
    adapter_parameters: None = Field(default=None, description="Use `merged_adapters`.")
    api_token: str | None = Field(default=None, description="Without effect.")


class GenerateRequest(RequestModel):
    """A text to continue."""

    inputs: Text
    parameters: GenerateParameters | None = None
    stream: bool | None = None


class PrefillToken(BaseModel):
    """A token of the prompt; the first one has no log-probability."""

    id: int
    text: str
    logprob: float | None


class GeneratedToken(BaseModel):
    """A new token. The texts of those that are not special add up to the generated text, which a
    stop string may end within the last of them."""

    id: int
    text: str
    logprob: float
    special: bool


class StreamDetails(BaseModel):
    """How the text ended. `seed` is null when nothing was drawn."""

    finish_reason: Literal["length", "eos_token", "stop_sequence"]
    prompt_tokens: int
    generated_tokens: int
    seed: int | None


class GenerateDetails(StreamDetails):
    """The same with the tokens; `prefill` is empty unless `decoder_input_details` asked for it."""

    prefill: list[PrefillToken]
    tokens: list[GeneratedToken]


class Generated(BaseModel):
    """The reply; `details` are there when they were asked for."""

    generated_text: str
    details: GenerateDetails | None = None


class GenerateEvent(BaseModel):
    """An event of a stream; the last one has the text, and the details that were asked for."""

    token: GeneratedToken
    generated_text: str | None
    details: StreamDetails | None
