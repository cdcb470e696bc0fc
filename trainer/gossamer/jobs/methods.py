"""The training methods' declarations: what each is called, what can be set, and where it is from.

The methods themselves are the trainer's (`gossamer.training`); whoever only lists, documents or
checks their parameters needs this file and no torch. Defaults that depend on the model or the
density, like learning rates, are the trainer's too.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Literal

from pydantic import Field, ValidationError, model_validator

from gossamer.jobs.errors import ParameterError, UnknownMethod
from gossamer.jobs.parameters import (
    REGEX,
    TARGETS,
    BlockSize,
    MethodParameters,
    Reference,
    References,
    Targets,
    finding,
)
from gossamer.store.catalog.mixes import MAX_PARENTS

__all__ = [
    "DECLARATIONS",
    "REGEX",
    "Declaration",
    "FullParameters",
    "LoraParameters",
    "LotaParameters",
    "LottoParameters",
    "McsParameters",
    "MethodParameters",
    "SpartaParameters",
    "find_declaration",
    "parameter_error",
]


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

    @classmethod
    def _without_meaning(cls, given: Mapping[str, Any]) -> dict[str, str]:
        if nothing := super()._without_meaning(given):
            return nothing
        calibration = ("calibration_fraction", "calibration_epochs", "calibration_steps")
        of_calibrated = ("scope", *calibration, "iterations")
        if given.get("mask_from") is not None:
            names = ("mask", "sparsity", "block_size", *of_calibrated)
            return dict.fromkeys(names, "the positions are those of mask_from; leave out one")
        if given.get("mask") == "random":
            return dict.fromkeys(of_calibrated, "it is about a calibrated mask, not a random one")
        return {}

    def _more_references(self) -> tuple[str, ...]:
        return () if self.mask_from is None else (self.mask_from,)


class LottoParameters(LotaParameters):
    """What can be set for LoTTO: all that LoTA has, and the chain to continue."""

    parents: References = Field(
        min_length=1,
        max_length=MAX_PARENTS,
        description="The adapters of the tasks before, the first one trained first; their "
        "positions are left alone and their values kept.",
    )

    @classmethod
    def _without_meaning(cls, given: Mapping[str, Any]) -> dict[str, str]:
        others = super()._without_meaning({**given, "init_from": None})
        return {"init_from": "a chain begins with its parents alone", **others}

    @model_validator(mode="after")
    def _check_parents(self) -> LottoParameters:
        for place, parent in enumerate(self.parents):
            if parent in self.parents[:place]:
                raise finding("it is named twice", "parents", place)
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
        default="-",
        description="Of mcs: whether the largest w·g, the smallest or the largest |w·g| is kept. "
        "The paper's formula has +, its text argues for -, which trains better.",
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
        description="Passes in which positions are selected anew; then they stay, and what is "
        "trained is sparse. A run of no more passes, like one of the default epochs, never gets "
        "there: the paper makes 5 and selects in the first.",
    )
    block_size: BlockSize = Field(
        default=1, description="Select tiles of so many rows and columns, by their summed scores."
    )
    layer_drop: bool = Field(
        default=False,
        description="Leave out layers whose scores all lie below one threshold over all layers.",
    )

    @classmethod
    def _without_meaning(cls, given: Mapping[str, Any]) -> dict[str, str]:
        if nothing := super()._without_meaning(given):
            return nothing
        if given.get("score", "mcs") != "mcs":
            return {"sign": "it belongs to the score mcs"}
        return {}


class _WholeParameters(MethodParameters):
    """Of a baseline: it trains all of its targets, whatever the adapter's positions are."""

    init_positions: Literal["select"] = Field(
        default="select",
        description="Of a run that begins with an adapter: all of the targets is trained, and the "
        "adapter's other entries stay as they are.",
    )


class FullParameters(_WholeParameters):
    """What can be set for full fine-tuning."""

    targets: Targets = Field(default="all-linear", description=f"Weights to train: {TARGETS}")


class LoraParameters(_WholeParameters):
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
