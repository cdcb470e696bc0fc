"""Modules that are replaced by shorter ones, and modules that must not be."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from gossamer.base.patch_map import PatchMap
from gossamer.engine.patched import StepDeltas, patch
from gossamer.engine.short_modules import (
    GatedMLP,
    PreNormLayer,
    RMSNorm,
    RotaryAttention,
)
from gossamer.engine.shortcuts import shorten
from tests.tiny import ARCHS, COMMON, tiny_model

LAYERS = COMMON["num_hidden_layers"]
#: Architecture → attention blocks and MLPs that have a shorter form. Qwen3 norms its heads, Phi-3
#: packs its weights itself, Gemma2 has another activation.
SHORT = {
    "llama": (LAYERS, LAYERS),
    "mistral": (LAYERS, LAYERS),
    "qwen2": (LAYERS, LAYERS),
    "qwen3": (0, LAYERS),
    "gemma2": (LAYERS, 0),
    "phi3": (0, 0),
}


KINDS = (RotaryAttention, GatedMLP, RMSNorm, PreNormLayer)

Forward = Callable[..., object]
Change = Callable[[PreTrainedModel], None]


def shortened(arch: str, change: Change = lambda _: None) -> dict[type, int]:
    """How many modules of each kind a model gets, after `change` to its layers."""
    model = tiny_model(arch)
    patch(model, PatchMap.of(model), StepDeltas(), "cpu")
    change(model)
    state = torch.get_rng_state()
    shorten(model, "cpu")
    assert torch.equal(torch.get_rng_state(), state)
    kinds = [type(module) for module in model.modules()]
    return {kind: kinds.count(kind) for kind in KINDS}


@pytest.mark.parametrize("arch", ARCHS)
def test_what_is_replaced(arch: str) -> None:
    counts = shortened(arch)
    assert (counts[RotaryAttention], counts[GatedMLP]) == SHORT[arch]
    assert counts[PreNormLayer] == (LAYERS if SHORT[arch] == (LAYERS, LAYERS) else 0)
    assert counts[RMSNorm] >= 2 * LAYERS + 1


def spoil(name: str, wrap: Callable[[Forward], Forward]) -> Change:
    """A change to one kind of module of the first layer."""

    def change(model: PreTrainedModel) -> None:
        module = model.get_submodule(f"model.layers.0.{name}".rstrip("."))
        module.forward = wrap(module.forward)

    return change


def times(result: object, factor: float) -> object:
    return (
        tuple(times(r, factor) for r in result)
        if isinstance(result, tuple)
        else (result * factor if isinstance(result, Tensor) else result)
    )


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("self_attn", RotaryAttention),
        ("mlp", GatedMLP),
        ("input_layernorm", RMSNorm),
        ("", PreNormLayer),
    ],
)
def test_a_module_that_computes_something_else_stays(name: str, kind: type) -> None:
    whole = shortened("llama")[kind]
    wrong = spoil(name, lambda f: lambda *a, **k: times(f(*a, **k), 1.001))
    assert shortened("llama", wrong)[kind] == whole - 1


def test_an_attention_that_turns_otherwise_or_takes_more_stays() -> None:
    def other_angles(f: Forward) -> Forward:
        def forward(
            *args: object, position_embeddings: tuple[Tensor, Tensor], **kwargs: object
        ) -> object:
            cos, sin = position_embeddings
            return f(*args, position_embeddings=(cos, -sin), **kwargs)

        return forward

    def a_bias(f: Forward) -> Forward:
        return lambda *args, **kwargs: f(*args, **kwargs, attention_bias=1.0)

    def of_another_kind(f: Forward) -> Forward:
        def forward(hidden: Tensor, nothing_known_here: Tensor) -> object:
            return f(hidden, nothing_known_here)

        return forward

    for wrap in (other_angles, a_bias, of_another_kind):
        counts = shortened("llama", spoil("self_attn", wrap))
        assert counts[RotaryAttention] == LAYERS - 1


def test_constants_of_a_layer_are_kept() -> None:
    model = tiny_model("gemma2")
    patch(model, PatchMap.of(model), StepDeltas(), "cpu")
    shorten(model, "cpu")
    found = [m.constants for m in model.modules() if isinstance(m, RotaryAttention)]
    assert all(c["softcap"] == model.config.attn_logit_softcapping for c in found)
    windows = {c.get("sliding_window") for c in found}
    assert windows == {None, model.config.sliding_window}


def test_a_model_in_another_dtype_stays_as_it_is() -> None:
    model = tiny_model("llama").bfloat16()
    patch(model, PatchMap.of(model), StepDeltas(), "reference")
    shorten(model, "reference")
    assert not any(isinstance(m, RMSNorm | GatedMLP) for m in model.modules())
