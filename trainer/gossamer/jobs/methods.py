"""The training methods' declarations: what each is called, what can be set, and where it is from.

The methods themselves are the trainer's (`gossamer.training`); whoever only lists, documents or
checks their parameters needs this file and no torch. Defaults that depend on the model or the
density, like learning rates, are the trainer's too.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    model_validator,
)

from gossamer.jobs.errors import ParameterError, UnknownMethod
from gossamer.jobs.patterns import LONGEST, Pattern
from gossamer.store.catalog.errors import InvalidName
from gossamer.store.catalog.mixes import MAX_PARENTS, parse_terms
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
#: which weights to train
Targets = Annotated[str, Field(max_length=LONGEST), AfterValidator(_check_targets)]
#: sides of a tile; 1 selects single elements
BlockSize = Literal[1, 8, 16, 32]

TARGETS = (
    "q, k, v, o, gate, up, down or names of layers, separated by commas; all-linear; or "
    "re:<regular expression>, searched for in the weights' names."
)


class MethodParameters(BaseModel):
    """What can be set for every method."""

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

    def references(self) -> tuple[str, ...]:
        """Every adapter that the parameters name, each once, in the order of the fields."""
        named = [t.ref.given for t in parse_terms(self.init_from)] if self.init_from else []
        return tuple(dict.fromkeys([*named, *self._more_references()]))

    def _more_references(self) -> tuple[str, ...]:
        return ()


class SpartaParameters(MethodParameters):
    """What can be set for SpaRTA."""

    density: float = Field(
        default=0.005, gt=0.0, le=1.0, description="Share of the parameters that is trained."
    )
    of: Literal["model", "targets"] = Field(
        default="model",
        description="What the density is a share of: all linear weights of the model, or the "
        "targets alone.",
    )
    targets: Targets = Field(
        default="v,o", description=f"Weights to train: {TARGETS} The paper's best are v and o."
    )
    mask_seed: int | None = Field(
        default=None,
        ge=0,
        lt=2**63,
        description="Seed of the positions; the seed of the run when it is not given.",
    )


class LotaParameters(MethodParameters):
    """What can be set for LoTA."""

    sparsity: float = Field(
        default=0.9,
        ge=0.0,
        lt=1.0,
        description="Share of the targets' elements that is left alone.",
    )
    targets: Targets = Field(default="all-linear", description=f"Weights to train: {TARGETS}")
    scope: Literal["global", "tensor"] = Field(
        default="global",
        description="Whether the largest changes are sought over all targets at once, or as many "
        "in each weight.",
    )
    calibration_fraction: float = Field(
        default=1.0,
        gt=0.0,
        le=1.0,
        description="Share of the training examples that the mask is calibrated on.",
    )
    calibration_epochs: float = Field(
        default=1.0,
        gt=0.0,
        le=1000.0,
        description="Passes over these examples, dense, before the mask is taken.",
    )
    calibration_steps: int | None = Field(
        default=None,
        ge=1,
        le=10_000_000,
        description="Updates to calibrate with; overrides the epochs.",
    )
    iterations: int = Field(
        default=1,
        ge=1,
        le=8,
        description="Steps in which the sparsity is reached; each is calibrated inside the mask "
        "of the step before (2 makes the paper's 99 %*).",
    )
    mask: Literal["calibrated", "random"] = Field(
        default="calibrated",
        description="random draws as many positions blindly: the control to compare with.",
    )
    mask_from: Reference | None = Field(
        default=None, description="Train the positions of this adapter; nothing is calibrated."
    )
    block_size: BlockSize = Field(
        default=1, description="Select tiles of so many rows and columns, by their sums."
    )

    @model_validator(mode="after")
    def _one_source_of_the_mask(self) -> LotaParameters:
        if self.mask_from is not None and self.mask == "random":
            raise ValueError("a mask is taken from an adapter or drawn at random, not both")
        if self.iterations > 1 and (self.mask_from is not None or self.mask == "random"):
            raise ValueError("only a calibrated mask can be reached in several iterations")
        return self

    def _more_references(self) -> tuple[str, ...]:
        return () if self.mask_from is None else (self.mask_from,)


class LottoParameters(LotaParameters):
    """What can be set for LoTTO: all that LoTA has, and the chain to continue."""

    parents: tuple[Reference, ...] = Field(
        min_length=1,
        max_length=MAX_PARENTS,
        description="The adapters of the tasks before, the first one trained first; their "
        "positions are left alone and their values kept.",
    )

    @model_validator(mode="after")
    def _check_parents(self) -> LottoParameters:
        if len(set(self.parents)) < len(self.parents):
            raise ValueError("a parent is named twice")
        if self.init_from is not None:
            raise ValueError("init_from belongs to other methods; a chain begins with its parents")
        return self

    def _more_references(self) -> tuple[str, ...]:
        return (*super()._more_references(), *self.parents)


class McsParameters(MethodParameters):
    """What can be set for MCS."""

    keep_ratio: float = Field(
        default=0.1, gt=0.0, le=1.0, description="Share of each target's elements that is trained."
    )
    targets: Targets = Field(default="q,k,v", description=f"Weights to train: {TARGETS}")
    score: Literal["mcs", "snip", "gradient", "magnitude", "grow_drop"] = Field(
        default="mcs",
        description="What positions are ranked by: w·g, |w·g|, |g|, |w|, or the smallest |w| "
        "dropped for the largest |g|; w is the change so far and g its gradient.",
    )
    sign: Literal["+", "-", "abs"] = Field(
        default="+",
        description="Of mcs: whether the largest w·g, the smallest or the largest |w·g| is kept. "
        "The paper's formula has +, its text argues for -.",
    )
    period: int = Field(
        default=100, ge=1, le=1_000_000, description="Updates between two selections."
    )
    warmup_steps: int | None = Field(
        default=None,
        ge=1,
        le=1_000_000,
        description="Dense updates before the first selection, where every score would be 0; when "
        "not given 100, or a tenth of the first epoch if that is less.",
    )
    selection_epochs: float = Field(
        default=1.0,
        gt=0.0,
        le=1000.0,
        description="Passes in which positions are selected anew; then they stay.",
    )
    block_size: BlockSize = Field(
        default=1, description="Select tiles of so many rows and columns, by their summed scores."
    )
    layer_drop: bool = Field(
        default=False,
        description="Leave out layers whose scores all lie below one threshold over all layers.",
    )

    @model_validator(mode="after")
    def _sign_of_mcs_only(self) -> McsParameters:
        if self.score != "mcs" and self.sign != "+":
            raise ValueError("sign belongs to the score mcs")
        return self


class FullParameters(MethodParameters):
    """What can be set for full fine-tuning."""

    targets: Targets = Field(default="all-linear", description=f"Weights to train: {TARGETS}")


class LoraParameters(MethodParameters):
    """What can be set for LoRA."""

    targets: Targets = Field(default="all-linear", description=f"Weights to adapt: {TARGETS}")
    rank: int = Field(default=8, ge=1, le=4096, description="Rank of the two factors' product.")
    alpha: float = Field(
        default=16.0, gt=0.0, le=1e6, description="The product is scaled by alpha / rank."
    )


@dataclass(frozen=True)
class Declaration:
    """A method as users see it.

    Attributes:
        name: what it is called in requests, on the command line and in the training record.
        summary: one line for people.
        paper: where it comes from.
        parameters: what it declares.
        job: whether it may be asked for as a job; the baselines may not.
    """

    name: str
    summary: str
    paper: str
    parameters: type[MethodParameters]
    job: bool = True

    def read(self, given: Mapping[str, Any]) -> MethodParameters:
        """The parameters that `given`, as from JSON, stands for.

        Raises:
            ParameterError: one is unknown, missing, or has a value that it cannot have.
        """
        try:
            return self.parameters.model_validate(dict(given))
        except ValidationError as error:
            raise parameter_error(error, "parameters") from error


#: Name → declaration.
DECLARATIONS: Mapping[str, Declaration] = MappingProxyType(
    {
        row.name: row
        for row in (
            Declaration(
                "sparta",
                "Train a random sparse set of parameters; its positions come from a seed.",
                "https://arxiv.org/abs/2502.15975",
                SpartaParameters,
            ),
            Declaration(
                "lota",
                "Calibrate densely, keep the positions that changed most, train only those.",
                "https://arxiv.org/abs/2406.16797",
                LotaParameters,
            ),
            Declaration(
                "lotto",
                "LoTA for one task after another, each outside the positions of those before.",
                "https://arxiv.org/abs/2406.16797",
                LottoParameters,
            ),
            Declaration(
                "mcs",
                "Select by a sensitivity score, anew every so many updates, then train on.",
                "https://arxiv.org/abs/2507.07140",
                McsParameters,
            ),
            Declaration(
                "full",
                "Train every element of the targets: the dense baseline.",
                "https://arxiv.org/abs/1801.06146",
                FullParameters,
                job=False,
            ),
            Declaration(
                "lora",
                "Train a low-rank product beside each target: the low-rank baseline.",
                "https://arxiv.org/abs/2106.09685",
                LoraParameters,
                job=False,
            ),
        )
    }
)


def find_declaration(name: str, *, for_job: bool = False) -> Declaration:
    """The declaration of that name.

    Raises:
        UnknownMethod: there is none, or none that jobs may use and `for_job` asks for that.
    """
    known = [d.name for d in DECLARATIONS.values() if d.job or not for_job]
    if name not in known:
        raise UnknownMethod(name, known)
    return DECLARATIONS[name]


def parameter_error(error: ValidationError, prefix: str = "") -> ParameterError:
    """The first of pydantic's findings as one of ours; the value itself is left out."""
    first = error.errors(include_url=False, include_input=False)[0]
    path = ".".join(str(part) for part in (prefix, *first["loc"]) if part != "")
    return ParameterError(path, first["msg"].removeprefix("Value error, "))
