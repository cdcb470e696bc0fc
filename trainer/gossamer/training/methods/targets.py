"""Which weights a method works on: short names, layer names or a regular expression."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import nn

from gossamer.jobs.methods import REGEX
from gossamer.jobs.patterns import Pattern
from gossamer.training.errors import ConfigError, UnknownTargetError, UntrainableBaseError

ALL_LINEAR = "all-linear"

#: Short name → the layers it stands for. A packed layer is one weight, so it is taken whole.
SHORT_NAMES: dict[str, tuple[str, ...]] = {
    "q": ("q_proj", "qkv_proj", "query_key_value"),
    "k": ("k_proj", "qkv_proj", "query_key_value"),
    "v": ("v_proj", "qkv_proj", "query_key_value"),
    "o": ("o_proj", "out_proj"),
    "gate": ("gate_proj", "gate_up_proj"),
    "up": ("up_proj", "gate_up_proj"),
    "down": ("down_proj",),
}


def match_targets(
    targets: str, table: Mapping[str, tuple[int, int]], others: Sequence[str] = ()
) -> dict[str, tuple[int, int]]:
    """The rows of `table` that `targets` names, in the table's order.

    Args:
        targets: `all-linear`; `re:` and a regular expression searched for in the weights' names; or
            a comma-separated list of short names (`SHORT_NAMES`) and names of layers (`o_proj`).
        table: base weight name → (out_features, in_features).
        others: what cannot be a target, for the error.

    Raises:
        UnknownTargetError: an item matches nothing.
        ConfigError: the list is empty, or the regular expression is none.
    """
    if targets.startswith(REGEX):
        return _search(targets, table, others)
    items = [item.strip() for item in targets.split(",") if item.strip()]
    if not items:
        raise ConfigError("parameters.targets", "it is empty")
    chosen: set[str] = set()
    for item in items:
        layers = SHORT_NAMES.get(item, (item,))
        found = {name for name in table if item == ALL_LINEAR or _layer(name) in layers}
        if not found:
            raise UnknownTargetError(item, sorted({_layer(name) for name in table}), others)
        chosen |= found
    return {name: shape for name, shape in table.items() if name in chosen}


def look_over(model: nn.Module, table: Mapping[str, tuple[int, int]]) -> tuple[str, ...]:
    """Classes of the modules that have matrices of their own which no target can name, sorted: a
    mixture's experts and its router.

    Embeddings and the output head are not among them; they are never targets.

    Raises:
        UntrainableBaseError: there is no other matrix, as in GPT-2, which is made of `Conv1D`.
    """
    others = _unlisted(model, table)
    if not table:
        raise UntrainableBaseError(others)
    return others


def _unlisted(model: nn.Module, table: Mapping[str, tuple[int, int]]) -> tuple[str, ...]:
    head = getattr(model, "get_output_embeddings", lambda: None)()
    return tuple(
        sorted(
            {
                type(module).__name__
                for name, module in model.named_modules()
                if module is not head and not isinstance(module, nn.Embedding)
                for own, parameter in module.named_parameters(name, recurse=False)
                if parameter.ndim > 1 and own not in table
            }
        )
    )


def _search(
    targets: str, table: Mapping[str, tuple[int, int]], others: Sequence[str]
) -> dict[str, tuple[int, int]]:
    try:
        pattern = Pattern(targets.removeprefix(REGEX))
    except ValueError as error:
        raise ConfigError("parameters.targets", str(error)) from error
    found = {name: shape for name, shape in table.items() if pattern.search(name)}
    if not found:
        raise UnknownTargetError(targets, sorted({_layer(name) for name in table}), others)
    return found


def _layer(name: str) -> str:
    """`model.layers.0.self_attn.q_proj.weight` → `q_proj`."""
    return name.removesuffix(".weight").rpartition(".")[2]
