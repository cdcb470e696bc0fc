"""What every training method's parameters share: what they name, and what may stand together."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    SerializerFunctionWrapHandler,
    ValidationError,
    model_serializer,
    model_validator,
)
from pydantic_core import InitErrorDetails, PydanticCustomError

from gossamer.jobs.patterns import LONGEST, Pattern
from gossamer.store.catalog.errors import InvalidName
from gossamer.store.catalog.mixes import parse_terms
from gossamer.store.catalog.names import Ref

#: what the targets of a regular expression begin with
REGEX = "re:"


def _named(parse: Callable[[str], object]) -> Callable[[str], str]:
    """A validator that keeps the text if `parse` can read it."""

    def check(text: str) -> str:
        try:
            parse(text)
        except InvalidName as error:
            raise ValueError(error.why) from error
        return text

    return check


def _check_targets(text: str) -> str:
    if text.startswith(REGEX):
        Pattern(text.removeprefix(REGEX))
    elif not any(item.strip() for item in text.split(",")):
        raise ValueError("it names no weights")
    return text


#: `sql`, `sql:3`, `sql@sha256:…`: one adapter
Reference = Annotated[str, AfterValidator(_named(Ref.parse))]
#: the same, or `sql*0.7+math*0.3`
MixReference = Annotated[str, AfterValidator(_named(parse_terms))]
#: several of one. A validator before the model's fields makes Python's values of JSON's, and then
#: a list is strictly no tuple.
References = Annotated[
    tuple[Reference, ...],
    BeforeValidator(lambda given: tuple(given) if isinstance(given, list) else given),
]
#: which weights to train
Targets = Annotated[str, Field(max_length=LONGEST), AfterValidator(_check_targets)]
#: sides of a tile; 1 selects single elements
BlockSize = Literal[1, 8, 16, 32]

TARGETS = (
    "q, k, v, o, gate, up, down or names of layers, separated by commas; all-linear; or "
    "re:<regular expression>, searched for in the weights' names."
)


class MethodParameters(BaseModel):
    """What can be set for every method.

    A parameter that means nothing beside the others is refused where it is given, be it with its
    default, and is null wherever the parameters are written down: a request that is kept with all
    defaults spelled out is read again as it was meant, and a record says nothing that was not so.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    init_from: MixReference | None = Field(
        default=None,
        description="Begin with this adapter or mix, instead of with the base alone.",
    )
    init_positions: Literal["inherit", "select"] = Field(
        default="inherit",
        description="Of a run that begins with an adapter: train its positions, or those that the "
        "method selects, the adapter's others staying as they are.",
    )

    @classmethod
    def _without_meaning(cls, given: Mapping[str, Any]) -> dict[str, str]:
        """Parameters that mean nothing beside those that are given → why."""
        positions = given.get("init_positions", cls.model_fields["init_positions"].default)
        if given.get("init_from") is None or positions != "inherit":
            return {}
        own = [name for name in cls.model_fields if name not in MethodParameters.model_fields]
        problem = 'init_from brings its own positions; set init_positions to "select"'
        return dict.fromkeys(own, problem)

    @model_validator(mode="before")
    @classmethod
    def _refuse_what_means_nothing(cls, given: Any) -> Any:
        if not isinstance(given, Mapping):
            return given
        meaningless = cls._without_meaning(given)
        for name, problem in meaningless.items():
            if given.get(name) is not None:
                raise finding(problem, name)
        return {name: value for name, value in given.items() if name not in meaningless}

    @model_validator(mode="after")
    def _positions_of_something(self) -> MethodParameters:
        default = type(self).model_fields["init_positions"].default
        if self.init_from is None and self.init_positions != default:
            raise finding("it is about the positions of init_from", "init_positions")
        return self

    @model_serializer(mode="wrap")
    def _written(self, write: SerializerFunctionWrapHandler) -> dict[str, Any]:
        written: dict[str, Any] = write(self)
        meaningless = self._without_meaning(self.__dict__)
        return {n: None if n in meaningless else value for n, value in written.items()}

    def references(self) -> tuple[str, ...]:
        """Every adapter that the parameters name, each once, in the order of the fields."""
        named = [t.ref.given for t in parse_terms(self.init_from)] if self.init_from else []
        return tuple(dict.fromkeys([*named, *self._more_references()]))

    def _more_references(self) -> tuple[str, ...]:
        return ()


def finding(problem: str, *field: str | int) -> ValidationError:
    """What a validator of several fields says about one of them, by its path."""
    kind = PydanticCustomError("out_of_place", "{problem}", {"problem": problem})
    details = InitErrorDetails(type=kind, loc=field, input=None)
    return ValidationError.from_exception_data("parameters", [details])
