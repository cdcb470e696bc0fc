"""What a run can be told besides its method, by whoever starts it: a tenant's job or a person."""

from __future__ import annotations

from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from gossamer.jobs.methods import parameter_error

#: OpenAI's hyper-parameters → our fields; `auto` stands for our default
OPENAI = {
    "n_epochs": "epochs",
    "batch_size": "batch_size",
    "learning_rate_multiplier": "learning_rate_multiplier",
}


class RunSettings(BaseModel):
    """The settings of a run that a tenant may choose.

    OpenAI's names are understood too: `n_epochs` for the epochs, and `auto` for the default of each
    of its three. `RunSettings.of` is the constructor for what a user sent: it raises the room's own
    errors.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    epochs: float = Field(default=1.0, gt=0.0, le=1000.0, description="Passes over the data.")
    max_steps: int | None = Field(
        default=None, ge=1, le=10_000_000, description="Updates to make; overrides the epochs."
    )
    batch_size: int = Field(default=16, ge=1, le=4096, description="Examples in a forward pass.")
    gradient_accumulation: int = Field(
        default=1, ge=1, le=4096, description="Forward passes for one update of the values."
    )
    max_length: int = Field(
        default=512,
        ge=2,
        le=1 << 20,
        description="Longer examples, in tokens, are left out and counted.",
    )
    packing: bool = Field(
        default=False, description="Put several short examples into one row, kept apart."
    )
    learning_rate: float | None = Field(
        default=None,
        gt=0.0,
        le=10.0,
        description="Peak; when not given the method chooses by density.",
    )
    learning_rate_multiplier: float = Field(
        default=1.0, gt=0.0, le=1000.0, description="The learning rate is multiplied by it."
    )
    schedule: Literal["linear", "cosine", "constant"] = Field(
        default="linear", description="How the learning rate falls after the warm-up."
    )
    warmup: float = Field(
        default=0.05, ge=0.0, le=1.0, description="Share of the steps in which it rises from 0."
    )
    weight_decay: float = Field(
        default=0.0, ge=0.0, le=10.0, description="Decoupled from the gradient, on the values."
    )
    max_grad_norm: float = Field(
        default=1.0, gt=0.0, le=1e6, description="The gradient of all values is clipped to it."
    )
    optimizer: Literal["adamw", "rmsprop"] | None = Field(
        default=None, description="When not given the method chooses."
    )
    precision: Literal["fp32", "bf16"] = Field(
        default="fp32",
        description="What matrix products run in; the values and their gradient stay fp32.",
    )
    value_dtype: Literal["BF16", "F32"] = Field(
        default="BF16", description="What the adapter's values are rounded to."
    )
    eval_fraction: float = Field(
        default=0.0, ge=0.0, lt=1.0, description="Share of the examples to hold out."
    )
    eval_steps: int | None = Field(
        default=None,
        ge=1,
        le=10_000_000,
        description="Evaluate every so many steps too, not only at the ends.",
    )
    checkpoint_steps: int | None = Field(
        default=None,
        ge=1,
        le=10_000_000,
        description="Keep the adapter every so many steps, to be tried out meanwhile.",
    )
    gradient_checkpointing: bool = Field(
        default=False, description="Compute activations again in the backward pass: less memory."
    )

    @model_validator(mode="before")
    @classmethod
    def _read_openai(cls, given: Any) -> Any:
        """Read OpenAI's names, and its `auto` as the default."""
        if not isinstance(given, dict):
            return given
        read = {k: v for k, v in given.items() if not (k in OPENAI and v == "auto")}
        if "n_epochs" in read:
            if "epochs" in read:
                raise ValueError("epochs and n_epochs are one setting; give it once")
            read["epochs"] = read.pop("n_epochs")
        return read

    @classmethod
    def of(cls, **settings: Any) -> Self:
        """The settings that these stand for.

        Raises:
            ParameterError: one is unknown, or cannot have the value that it has.
        """
        try:
            return cls.model_validate(settings)
        except ValidationError as error:
            raise parameter_error(error, "settings") from error
