"""Shorter modules in the place of transformers' own, where they compute the same.

A decode step of a small model spends more time between the products than one would think: 30 layers
of SmolLM2-135M take 31 of 97 ms there at 16 rows, mostly in calls of operations that touch a few
kilobytes each. A norm, a gated MLP and an attention block with rotary positions can be written with
three kernels, and a layer that adds them up without the modules' calls. Whether a module is one of
these is not read off its class: both are run on random input, and the module stays as it is unless
the results agree.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel

from gossamer.base.alike import MISFITS, alike
from gossamer.engine.attention import AttentionStep, matters
from gossamer.engine.patched import PatchedLinear, Slice
from gossamer.engine.short_modules import (
    GatedMLP,
    Heads,
    LayerStack,
    PreNormLayer,
    RMSNorm,
    RotaryAttention,
)
from gossamer.kernels import Backend, new_kv_pages, rotate_and_write

RECORDER = "gossamer_recorder"

_ROWS = 3


@dataclass(frozen=True)
class _Bench:
    """What modules are tried on: whose kernels, and random numbers where and as the model's are."""

    backend: Backend
    device: torch.device
    dtype: torch.dtype

    def randn(self, *shape: int) -> Tensor:
        """Standard normal, drawn on the host."""
        return torch.randn(*shape).to(self.device, self.dtype)

    def pages(self, heads: int, dim: int) -> tuple[Tensor, Tensor]:
        """One page of 16 positions."""
        return new_kv_pages(1, 16, heads, dim, self.dtype, self.device, self.backend)

    def integers(self, *values: int, dtype: torch.dtype = torch.int32) -> Tensor:
        """As a step has them."""
        return torch.tensor(values, dtype=dtype, device=self.device)


@dataclass(frozen=True)
class Recorded:
    """How a module called its attention function.

    query: [1, heads, rows, dim], key and value: [1, kv heads, rows, dim], after the rotation;
    returned: what the function then gave back, [1, rows, heads, dim].
    """

    query: Tensor
    key: Tensor
    value: Tensor
    returned: Tensor
    constants: dict[str, Any]


def record(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    calls: list[Recorded],
    **constants: Any,
) -> tuple[Tensor, None]:
    """An attention function that notes its arguments and returns noise."""
    del module, attention_mask
    returned = torch.randn(1, query.shape[2], query.shape[1], query.shape[3]).to(query)
    calls.append(Recorded(query, key, value, returned, constants))
    return returned, None


AttentionInterface.register(RECORDER, record)


@torch.inference_mode()
def shorten(model: PreTrainedModel, backend: Backend) -> None:
    """Replace, in place, every module of a patched model that a shorter one equals.

    Leaves the model with another attention function; the caller sets its own. On a device with the
    Triton kernels, or on a CPU in fp32; elsewhere the model stays as it is.
    """
    on_host = model.device.type == "cpu" and model.dtype is torch.float32
    if not on_host and backend != "triton":
        return
    bench = _Bench(backend, model.device, model.dtype)
    model.set_attn_implementation(RECORDER)
    state = torch.get_rng_state()
    try:
        torch.manual_seed(0)
        for kinds in ((_norm_like, _mlp_like, _attention_like), (_layer_like,)):
            _replace(model, kinds, bench)
        _stack(model.base_model, bench)
    finally:
        torch.set_rng_state(state)


def _replace(
    model: nn.Module, kinds: Sequence[Callable[[nn.Module, _Bench], nn.Module | None]],
    bench: _Bench,
) -> None:  # fmt: skip
    gone: tuple[str, ...] = ()
    for name, module in list(model.named_modules()):
        if name.startswith(gone):
            continue
        made = next((m for kind in kinds if (m := kind(module, bench)) is not None), None)
        if made is not None:
            model.set_submodule(name, made)
            gone += (f"{name}.",)


def _norm_like(module: nn.Module, bench: _Bench) -> RMSNorm | None:
    weight = getattr(module, "weight", None)
    eps = getattr(module, "variance_epsilon", getattr(module, "eps", None))
    if not type(module).__name__.endswith("RMSNorm") or not isinstance(eps, float):
        return None
    if not isinstance(weight, Tensor) or weight.dim() != 1:
        return None
    x = bench.randn(_ROWS, len(weight))
    wanted = module(x)
    scales = [weight.detach()]  # Llama's form
    if weight.dtype is torch.float32:
        scales.append(1.0 + weight.detach())  # Gemma's form; 16 bits would round the sum
    for scale in scales:
        made = RMSNorm(scale, eps, bench.backend)
        if alike(made(x), wanted):
            return made
    return None


def _product(parts: list[Any]) -> PatchedLinear | None:
    """The one product whose slices, all and in order, the modules `parts` are."""
    if not all(isinstance(part, Slice) for part in parts):
        return None
    packed = parts[0].packed
    whole = len(packed.rows) == len(parts)
    ordered = all(part.packed is packed and part.index == i for i, part in enumerate(parts))
    product: PatchedLinear = packed.linear
    return product if whole and ordered else None


def _mlp_like(module: nn.Module, bench: _Bench) -> GatedMLP | None:
    gate_up = _product([getattr(module, name, None) for name in ("gate_proj", "up_proj")])
    down = getattr(module, "down_proj", None)
    if gate_up is None or not isinstance(down, PatchedLinear):
        return None
    made = GatedMLP(gate_up, down, bench.backend)
    x = bench.randn(_ROWS, gate_up.shape[1])
    try:
        return made if alike(made(x), module(x)) else None
    except MISFITS:
        return None


def _attention_like(module: nn.Module, bench: _Bench) -> RotaryAttention | None:
    qkv = _product([getattr(module, name, None) for name in ("q_proj", "k_proj", "v_proj")])
    o, layer = getattr(module, "o_proj", None), getattr(module, "layer_idx", None)
    head_dim = getattr(module, "head_dim", None)
    if qkv is None or not isinstance(o, PatchedLinear) or not isinstance(layer, int):
        return None
    if not isinstance(head_dim, int):
        return None
    hidden = bench.randn(1, _ROWS, qkv.shape[1])
    cos, sin = bench.randn(2, 1, _ROWS, head_dim).unbind()
    calls: list[Recorded] = []
    try:
        out = module(hidden, position_embeddings=(cos, sin), attention_mask=None, calls=calls)
        (recorded,) = calls
        heads = Heads(recorded.query.shape[1], recorded.key.shape[1], recorded.key.shape[3])
        made = RotaryAttention(qkv, o, layer, heads, _known(recorded), bench.backend)
        fits = alike(out[0], o(recorded.returned.reshape(1, _ROWS, -1)))
        return made if fits and _rotates_like(qkv, hidden, cos, sin, recorded, bench) else None
    except MISFITS:
        return None


def _layer_like(module: nn.Module, bench: _Bench) -> PreNormLayer | None:
    """Run beside the layer, on one sequence with a page of its own."""
    norms = [getattr(module, n, None) for n in ("input_layernorm", "post_attention_layernorm")]
    attention, mlp = getattr(module, "self_attn", None), getattr(module, "mlp", None)
    if not isinstance(attention, RotaryAttention) or not isinstance(mlp, GatedMLP):
        return None
    first, second = norms
    if not isinstance(first, RMSNorm) or not isinstance(second, RMSNorm):
        return None
    made = PreNormLayer(first, attention, second, mlp)
    hidden = bench.randn(1, _ROWS, first.weight.shape[0])
    angles = bench.randn(2, 1, _ROWS, attention.heads.dim).unbind()
    step = _alone(attention, bench)
    try:
        wanted = module(hidden, position_embeddings=angles, attention_mask=None, step=step)
        return made if alike(made(hidden, position_embeddings=angles, step=step), wanted) else None
    except MISFITS:
        return None


def _stack(base: nn.Module, bench: _Bench) -> None:
    """All layers as one module, if the base then computes the same as one by one."""
    layers = getattr(base, "layers", None)
    if not isinstance(layers, nn.ModuleList) or not layers:
        return
    each = [layer for layer in layers if isinstance(layer, PreNormLayer)]
    if len(each) < len(layers):
        return
    hidden = bench.randn(1, _ROWS, each[0].norm.weight.shape[0])
    last = max((layer.attention for layer in each), key=lambda attention: attention.layer)
    step = _alone(last, bench)

    def computed() -> Tensor:
        positions = torch.arange(_ROWS, device=bench.device)[None]
        out = base(inputs_embeds=hidden, position_ids=positions, use_cache=False, step=step)
        result: Tensor = out.last_hidden_state
        return result

    try:
        wanted = computed()
        base.layers = nn.ModuleList([LayerStack(each)])
        same = alike(computed(), wanted)
    except MISFITS:
        same = False
    if not same:
        base.layers = layers


def _alone(attention: RotaryAttention, bench: _Bench) -> AttentionStep:
    """A step of one sequence of `_ROWS` rows; layers up to this one share a page."""
    pages = bench.pages(attention.heads.key_value, attention.heads.dim)
    return AttentionStep(
        kv=[pages] * (attention.layer + 1),
        slots=bench.integers(*range(_ROWS), dtype=torch.int64),
        page_table=bench.integers(0)[None],
        query_start=bench.integers(0, _ROWS),
        context_len=bench.integers(_ROWS),
        backend=bench.backend,
    )


def _known(recorded: Recorded) -> dict[str, Any]:
    """Of the call's constants those that `attend_rows` takes.

    Raises:
        ValueError: there are others, that would change the result.
    """
    taken = {"scaling", "sliding_window", "softcap"}
    constants = {k: v for k, v in recorded.constants.items() if matters(k, v)}
    if constants.pop("dropout", 0.0) or not constants.keys() <= taken:
        raise ValueError(f"the attention takes {', '.join(sorted(constants))}")
    return constants


def _rotates_like(
    qkv: PatchedLinear, hidden: Tensor, cos: Tensor, sin: Tensor, wanted: Recorded, bench: _Bench
) -> bool:
    """Whether q, k and v reach the attention as our kernel leaves them."""
    kv_heads, head_dim = wanted.key.shape[1], wanted.key.shape[3]
    slots = bench.integers(*range(_ROWS), dtype=torch.int64)
    rows = qkv(hidden[0])
    rotate_and_write(rows, cos[0], sin[0], *bench.pages(kv_heads, head_dim), slots, bench.backend)
    heads = rows.view(_ROWS, -1, head_dim).transpose(0, 1)
    given = torch.cat((wanted.query[0], wanted.key[0], wanted.value[0]))
    return alike(heads, given)
