"""What a training run is told, and nothing else: the same config, data and base give one result."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, SerializeAsAny, ValidationError, model_validator

from gossamer.training.errors import ConfigError
from gossamer.training.methods import METHODS, MethodParameters, find_method


class TrainConfig(BaseModel):
    """The settings of one run.

    `TrainConfig.of` is the constructor for what a user typed: it raises the room's own errors.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    data: Path = Field(description="Training examples, one JSON object a line.")
    method: str = Field(default="sparta", description=f"One of {', '.join(METHODS)}.")
    parameters: SerializeAsAny[MethodParameters] = Field(
        description="What the method declares; a mapping is read as its parameters."
    )
    eval_data: Path | None = Field(
        default=None, description="Held-out examples: the loss and token accuracy are reported."
    )
    eval_fraction: float = Field(
        default=0.0, ge=0.0, lt=1.0, description="Share of the examples to hold out instead."
    )
    eval_steps: int | None = Field(
        default=None, ge=1, description="Evaluate every so many steps too, not only at the ends."
    )
    max_length: int = Field(
        default=512, ge=2, description="Longer examples, in tokens, are left out and counted."
    )
    batch_size: int = Field(default=16, ge=1, description="Examples in a forward pass.")
    gradient_accumulation: int = Field(
        default=1, ge=1, description="Forward passes for one update of the values."
    )
    epochs: float = Field(default=1.0, gt=0.0, description="Passes over the data.")
    max_steps: int | None = Field(
        default=None, ge=1, description="Updates to make; overrides the epochs."
    )
    learning_rate: float | None = Field(
        default=None, gt=0.0, description="Peak; when not given the method chooses by density."
    )
    schedule: Literal["linear", "cosine", "constant"] = Field(
        default="linear", description="How the learning rate falls after the warm-up."
    )
    warmup: float = Field(
        default=0.05, ge=0.0, le=1.0, description="Share of the steps in which it rises from 0."
    )
    weight_decay: float = Field(default=0.0, ge=0.0, description="AdamW's, on the values.")
    max_grad_norm: float = Field(
        default=1.0, gt=0.0, description="The gradient of all values is clipped to this norm."
    )
    seed: int = Field(
        default=0,
        ge=0,
        lt=2**32,
        description="Of the order of the examples, the held-out split and the method.",
    )
    precision: Literal["fp32", "bf16"] = Field(
        default="fp32",
        description="What matrix products run in; the values and their gradient stay fp32.",
    )
    value_dtype: Literal["BF16", "F32"] = Field(
        default="BF16", description="What the adapter's values are rounded to."
    )
    device: Literal["auto", "cpu", "cuda"] = Field(
        default="auto", description="Where to train; auto takes a GPU where there is one."
    )

    @model_validator(mode="before")
    @classmethod
    def _read_parameters(cls, given: Any) -> Any:
        """Read the parameters as those of the method that is named beside them."""
        if not isinstance(given, dict):
            return given
        declared = find_method(str(given.get("method", "sparta"))).parameters
        parameters = given.get("parameters", {})
        if isinstance(parameters, MethodParameters):
            if not isinstance(parameters, declared):
                raise ConfigError("parameters", f"these are not the ones of {declared.__name__}")
            return given
        try:
            return {**given, "parameters": declared.model_validate(parameters)}
        except ValidationError as error:
            raise _config_error(error, "parameters.") from error

    @model_validator(mode="after")
    def _one_source_of_held_out_examples(self) -> TrainConfig:
        if self.eval_data is not None and self.eval_fraction:
            raise ConfigError("eval_fraction", "the held-out examples are given by eval_data")
        return self

    @classmethod
    def of(cls, **settings: Any) -> TrainConfig:
        """The config of these settings.

        Raises:
            ConfigError: one cannot have the value that it has.
            UnknownMethodError: there is no such method.
        """
        try:
            return cls.model_validate(settings)
        except ValidationError as error:
            raise _config_error(error) from error


def _config_error(error: ValidationError, prefix: str = "") -> ConfigError:
    first = error.errors(include_url=False)[0]
    return ConfigError(prefix + ".".join(map(str, first["loc"])), first["msg"])
