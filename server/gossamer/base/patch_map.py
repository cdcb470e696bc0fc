"""The one owner of "base weight name → where the engine keeps it".

Deltas are always named as in the base's own files (`model.layers.0.self_attn.q_proj.weight`). The
engine packs q,k,v and gate,up into one product each, so one of its weights (a *patched weight*)
may hold several of the base's, stacked by rows. Nothing outside this module knows that mapping.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType

import torch
from torch import nn

#: Siblings that read the same input, so that one product serves them all; in the order that the
#: model's own forward calls them.
PACKED_SIBLINGS: tuple[tuple[str, ...], ...] = (
    ("q_proj", "k_proj", "v_proj"),
    ("gate_proj", "up_proj"),
)


@dataclass(frozen=True)
class PatchedWeight:
    """One product of the engine.

    Attributes:
        name: of this product, unique in the model.
        modules: dotted names of the base's Linear modules in it, top to bottom.
        rows: output features of each of them.
        in_features: columns.
    """

    name: str
    modules: tuple[str, ...]
    rows: tuple[int, ...]
    in_features: int

    @property
    def shape(self) -> tuple[int, int]:
        """(out_features, in_features) of the whole product."""
        return sum(self.rows), self.in_features


@dataclass(frozen=True)
class Place:
    """Where one base weight lies: rows [row_offset, row_offset + rows) of `weight`.

    `projection` is its index among the weights packed there.
    """

    weight: str
    projection: int
    row_offset: int
    rows: int


@dataclass(frozen=True)
class PatchMap:
    """Every weight that a delta may change, both ways round."""

    weights: Mapping[str, PatchedWeight]
    places: Mapping[str, Place]

    @classmethod
    def of(cls, model: nn.Module) -> PatchMap:
        """Read the map off a causal LM: every `nn.Linear` but its output head.

        The output head stays out: it runs on the sampled rows only, and where it is tied a change
        to it would be a change to the embedding as well.
        """
        weights: dict[str, PatchedWeight] = {}
        places: dict[str, Place] = {}
        for patched in _products(model):
            weights[patched.name] = patched
            offset = 0
            for index, (module, rows) in enumerate(zip(patched.modules, patched.rows, strict=True)):
                places[f"{module}.weight"] = Place(patched.name, index, offset, rows)
                offset += rows
        return cls(MappingProxyType(weights), MappingProxyType(places))

    def table(self) -> dict[str, tuple[int, int]]:
        """Base weight name → (out_features, in_features), for the validator of adapter files."""
        return {
            name: (place.rows, self.weights[place.weight].in_features)
            for name, place in self.places.items()
        }


def adapter_table(model: nn.Module) -> dict[str, tuple[int, int]]:
    """Base weight name → (out_features, in_features) of every weight an adapter may change."""
    return PatchMap.of(model).table()


def _products(model: nn.Module) -> Iterator[PatchedWeight]:
    get_head = getattr(model, "get_output_embeddings", None)
    head = get_head() if get_head is not None else None
    for parent_name, parent in model.named_modules():
        taken: set[str] = set()
        for siblings in PACKED_SIBLINGS:
            parts = [getattr(parent, name, None) for name in siblings]
            if _can_pack(parts):
                taken.update(siblings)
                packed = "_".join(name.removesuffix("_proj") for name in siblings)
                yield _product(parent_name, packed, siblings, [p for p in parts if p is not None])
        for name, child in parent.named_children():
            if isinstance(child, nn.Linear) and child is not head and name not in taken:
                yield _product(parent_name, name, (name,), [child])


def _can_pack(parts: list[nn.Module | None]) -> bool:
    linears = [part for part in parts if type(part) is nn.Linear]
    return (
        len(linears) == len(parts)
        and len({part.in_features for part in linears}) == 1
        and len({part.bias is None for part in linears}) == 1
        and len({part.weight.dtype for part in linears}) == 1
    )


def _product(
    parent: str, name: str, siblings: tuple[str, ...], parts: list[nn.Module]
) -> PatchedWeight:
    prefix = f"{parent}." if parent else ""
    linears = [part for part in parts if isinstance(part, nn.Linear)]
    return PatchedWeight(
        name=prefix + name,
        modules=tuple(prefix + sibling for sibling in siblings),
        rows=tuple(linear.out_features for linear in linears),
        in_features=linears[0].in_features,
    )


def stacked(model: nn.Module, patched: PatchedWeight) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The product's weight (out, in) and bias (out) or None, copied out of the model's modules."""
    linears = [model.get_submodule(name) for name in patched.modules]
    weight = torch.cat([linear.get_parameter("weight").detach() for linear in linears])
    biases = [getattr(linear, "bias", None) for linear in linears]
    if biases[0] is None:
        return weight, None
    return weight, torch.cat([bias.detach() for bias in biases if bias is not None])
