"""What a tenant asks for, checked before it is kept."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Annotated, Any, Self

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    SerializeAsAny,
    StringConstraints,
    ValidationError,
    model_validator,
)

from gossamer.jobs.errors import ParameterError
from gossamer.jobs.methods import MethodParameters, find_declaration, parameter_error
from gossamer.jobs.settings import RunSettings
from gossamer.jobs.views import RequestView
from gossamer.store.catalog.errors import InvalidName, ReservedName
from gossamer.store.catalog.names import check_new_name

#: OpenAI's bounds
MAX_PAIRS, MAX_SUFFIX = 16, 64


def _storable(text: str) -> str:
    """Neither database takes a lone surrogate, and PostgreSQL no NUL."""
    if "\0" in text or any("\ud800" <= c <= "\udfff" for c in text):
        raise ValueError("it has a character that is none")
    return text


_Key = Annotated[str, StringConstraints(max_length=64), AfterValidator(_storable)]
_Value = Annotated[str, StringConstraints(max_length=512), AfterValidator(_storable)]


class JobRequest(BaseModel):
    """A job to submit. `JobRequest.of` is the constructor for what a user sent: it raises the
    room's own errors."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    method: str = Field(description="Name of a declaration that jobs may use.")
    parameters: SerializeAsAny[MethodParameters] = Field(
        description="What the method declares; a mapping is read as its parameters."
    )
    settings: RunSettings = RunSettings()
    training_file: str = Field(description="Id of a file for fine-tuning.")
    validation_file: str | None = None
    model: str = Field(default="base", max_length=512, description="The base, as it was named.")
    base_fingerprint: str = Field(
        max_length=80, description="Of the base to train on; only its workers take the job."
    )
    references: Mapping[str, str] = Field(
        default_factory=dict,
        description="Reference in the parameters → the version it means now, `name@sha256:…`.",
    )
    suffix: str | None = Field(
        default=None, max_length=MAX_SUFFIX, description="Name of the adapter to make."
    )
    seed: int | None = Field(default=None, ge=0, lt=2**32, description="Drawn when not given.")
    metadata: dict[_Key, _Value] | None = Field(default=None, max_length=MAX_PAIRS)

    @model_validator(mode="before")
    @classmethod
    def _read_parameters(cls, given: Any) -> Any:
        """Read the parameters as those of the method that is named beside them."""
        if not isinstance(given, dict) or not isinstance(given.get("method"), str):
            return given
        declaration = find_declaration(given["method"], for_job=True)
        parameters = given.get("parameters", {})
        if isinstance(parameters, Mapping):
            return {**given, "parameters": declaration.read(parameters)}
        if not isinstance(parameters, declaration.parameters):
            raise ParameterError("parameters", f"these are not those of {declaration.name}")
        return given

    @model_validator(mode="after")
    def _check_together(self) -> JobRequest:
        if self.suffix is not None:
            try:
                check_new_name(self.suffix, self.model)
            except InvalidName as error:
                raise ParameterError("suffix", error.why) from error
            except ReservedName as error:
                raise ParameterError("suffix", "this name is the base model's") from error
        if self.validation_file is not None and self.settings.eval_fraction:
            raise ParameterError(
                "settings.eval_fraction", "the held-out examples are given by validation_file"
            )
        held_out = self.validation_file is not None or self.settings.eval_fraction > 0
        if self.settings.eval_steps is not None and not held_out:
            raise ParameterError(
                "settings.eval_steps",
                "there are no held-out examples; give a validation_file or an eval_fraction",
            )
        if unknown := set(self.references) - set(self.parameters.references()):
            raise ParameterError("references", f"{min(unknown)!r} is not in the parameters")
        return self

    @classmethod
    def of(cls, **fields: Any) -> Self:
        """The request that these fields make.

        Raises:
            ParameterError: one is unknown, missing, or has a value that it cannot have.
            UnknownMethod: there is no such method, or it is not offered as a job.
        """
        try:
            return cls.model_validate(fields)
        except ValidationError as error:
            raise parameter_error(error) from error

    def to_json(self) -> dict[str, Any]:
        """All of it, defaults spelled out, so that a later release's defaults do not change it."""
        return self.model_dump(mode="json")

    def digest(self) -> str:
        """`sha256:…` of what is asked for: equal for equal requests, however they were written."""
        text = json.dumps(self.to_json(), sort_keys=True, separators=(",", ":"))
        return "sha256:" + hashlib.sha256(text.encode()).hexdigest()


def request_view(stored: Mapping[str, Any]) -> RequestView:
    """A stored request as it is shown. Nothing is checked again: an older release may have
    written it, and its job must be listed all the same."""
    return RequestView(
        model=stored["model"],
        method=stored["method"],
        parameters=stored["parameters"],
        settings=stored["settings"],
        references=stored["references"],
        training_file=stored["training_file"],
        validation_file=stored["validation_file"],
        suffix=stored["suffix"],
        metadata=stored["metadata"],
    )
