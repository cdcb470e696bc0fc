"""The settings of one run, checked before the training stack is imported."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal, Self

from pydantic import Field, SerializeAsAny, ValidationError, model_validator

from gossamer.jobs.errors import ParameterError, UnknownMethod
from gossamer.jobs.methods import DECLARATIONS, MethodParameters, find_declaration
from gossamer.jobs.settings import RunSettings
from gossamer.training.errors import ConfigError, UnknownMethodError


class TrainConfig(RunSettings):
    """The settings of one run: those that a job may choose, and where things are.

    `TrainConfig.of` is the constructor for what a user typed: it raises the room's own errors.
    """

    data: Path = Field(description="Training examples, one JSON object a line.")
    method: str = Field(default="sparta", description=f"One of {', '.join(DECLARATIONS)}.")
    parameters: SerializeAsAny[MethodParameters] = Field(
        description="What the method declares; a mapping is read as its parameters."
    )
    eval_data: Path | None = Field(
        default=None,
        description="Held-out examples: loss, token accuracy and exact match are reported.",
    )
    seed: int = Field(
        default=0,
        ge=0,
        lt=2**32,
        description="Of the order of the examples, the held-out split and the method.",
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
        try:
            declaration = find_declaration(str(given.get("method", "sparta")))
        except UnknownMethod as error:
            raise UnknownMethodError(error.name, error.known) from error
        parameters = given.get("parameters", {})
        if isinstance(parameters, MethodParameters):
            if not isinstance(parameters, declaration.parameters):
                raise ConfigError("parameters", f"these are not the ones of {declaration.name}")
            return given
        try:
            return {**given, "parameters": declaration.read(parameters)}
        except ParameterError as error:
            raise ConfigError(error.field, error.problem) from error

    @model_validator(mode="after")
    def _one_source_of_held_out_examples(self) -> TrainConfig:
        if self.eval_data is not None and self.eval_fraction:
            raise ConfigError("eval_fraction", "the held-out examples are given by eval_data")
        if self.eval_steps is not None and self.eval_data is None and not self.eval_fraction:
            problem = "there are no held-out examples; give eval_data or an eval_fraction"
            raise ConfigError("eval_steps", problem)
        return self

    @classmethod
    def of(cls, **settings: Any) -> Self:
        """The config of these settings.

        Raises:
            ConfigError: one cannot have the value that it has.
            UnknownMethodError: there is no such method.
        """
        try:
            return cls.model_validate(settings)
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            field = ".".join(map(str, first["loc"]))
            raise ConfigError(field, first["msg"].removeprefix("Value error, ")) from error
