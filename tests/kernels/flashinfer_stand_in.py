"""What stands in for FlashInfer where there is no card: its documented semantics, in plain torch.

Written from FlashInfer's documentation and sources, not from our code: it attends by the arrays of
`plan` alone. Calls are bound to the parameters that the real class has, and an argument that is not
understood here is refused, so that nothing is passed which this module would silently ignore.
"""

from __future__ import annotations

import inspect
import sys
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

#: Where the parameters below were read.
VERSION = "0.7.2.post1"

#: Parameters of `BatchPrefillWithPagedKVCacheWrapper`'s methods in that version, in their order;
#: those behind "*" are passed by name.
PARAMETERS = {
    "__init__": """self float_workspace_buffer kv_layout use_cuda_graph qo_indptr_buf
        paged_kv_indptr_buf paged_kv_indices_buf paged_kv_last_page_len_buf custom_mask_buf
        mask_indptr_buf backend jit_args jit_kwargs variant_owns_mask""",
    "plan": """self qo_indptr paged_kv_indptr paged_kv_indices paged_kv_last_page_len num_qo_heads
        num_kv_heads head_dim_qk page_size head_dim_vo custom_mask packed_custom_mask causal
        pos_encoding_mode use_fp16_qk_reduction sm_scale window_left logits_soft_cap rope_scale
        rope_theta q_data_type kv_data_type o_data_type non_blocking prefix_len_ptr
        token_pos_in_items_ptr token_pos_in_items_len max_item_len_ptr seq_lens seq_lens_q
        block_tables max_token_per_sequence max_sequence_kv fixed_split_size disable_split_kv
        uniform_q_len""",
    "run": """self q paged_kv_cache * q_scale k_scale v_scale out lse return_lse lse_base lse_layout
        enable_pdl window_left sinks kv_cache_sf skip_softmax_threshold_scale_factor
        use_fp16_softmax uses_spcompress""",
}

#: What the real `plan` is given by us and this one understands.
_PLANNED = {
    "qo_indptr", "paged_kv_indptr", "paged_kv_indices", "paged_kv_last_page_len", "num_qo_heads",
    "num_kv_heads", "head_dim_qk", "page_size", "causal", "sm_scale", "window_left",
    "logits_soft_cap", "q_data_type", "kv_data_type",
}  # fmt: skip
_ARRAYS = ("qo_indptr", "paged_kv_indptr", "paged_kv_indices", "paged_kv_last_page_len")


def names(method: str) -> list[str]:
    """The parameters of a method, without the star."""
    return [name for name in PARAMETERS[method].split() if name != "*"]


def bind(method: str, known: set[str], *args: object, **kwargs: object) -> dict[str, Any]:
    """The arguments of a call by name; TypeError where the real method would raise it."""
    positional, _, by_name = PARAMETERS[method].partition("*")
    kind = inspect.Parameter
    parameters = [kind(name, kind.POSITIONAL_OR_KEYWORD) for name in positional.split()[1:]]
    parameters += [kind(name, kind.KEYWORD_ONLY) for name in by_name.split()]
    given = dict(inspect.Signature(parameters).bind_partial(*args, **kwargs).arguments)
    if given.keys() - known:
        raise NotImplementedError(f"the stand-in knows no {sorted(given.keys() - known)}")
    return given


class BatchPrefillWithPagedKVCacheWrapper:
    """Attends as FlashInfer's of the same name. `plans` counts the calls of all `plan`s."""

    plans = 0

    def __init__(self, *args: object, **kwargs: object) -> None:
        given = bind("__init__", {"float_workspace_buffer", "kv_layout"}, *args, **kwargs)
        assert given["kv_layout"] == "HND"
        assert given["float_workspace_buffer"].dtype is torch.uint8
        self.planned: dict[str, Any] = {}

    def plan(self, *args: object, **kwargs: object) -> None:
        """Remember the arrays, as copies: the real one has them on the device afterwards."""
        given = bind("plan", _PLANNED, *args, **kwargs)
        for name in _ARRAYS:
            assert given[name].dtype is torch.int32
            assert not given[name].is_cuda, "plan reads it on the host, and would wait for it"
            given[name] = given[name].clone()
        last = given["paged_kv_last_page_len"]
        assert ((last >= 1) & (last <= given["page_size"])).all()
        type(self).plans += 1
        self.planned = given

    def run(self, *args: object, **kwargs: object) -> Tensor:
        """One layer: q [rows, heads, dim] → `out`, which is returned."""
        given = bind("run", {"q", "paged_kv_cache", "out"}, *args, **kwargs)
        plan = self.planned
        q: Tensor = given["q"]
        out: Tensor = given["out"]
        assert isinstance(given["paged_kv_cache"], tuple)
        keys, values = given["paged_kv_cache"]
        assert q.dtype is plan["q_data_type"]
        assert keys.dtype is values.dtype is plan["kv_data_type"]
        assert keys.stride() == values.stride(), "fa3 takes no other"
        assert len(q) == int(plan["qo_indptr"][-1])
        assert out.is_contiguous()
        assert out.shape == q.shape
        starts, firsts = plan["qo_indptr"].tolist(), plan["paged_kv_indptr"].tolist()
        for i, last in enumerate(plan["paged_kv_last_page_len"].tolist()):
            pages = plan["paged_kv_indices"][firsts[i] : firsts[i + 1]].long().to(q.device)
            length = (len(pages) - 1) * plan["page_size"] + last
            rows = slice(starts[i], starts[i + 1])
            out[rows] = self._one(q[rows], _flat(keys, pages, length), _flat(values, pages, length))
        return out

    def _one(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """One request: q [rows, heads, dim], k and v [length, kv heads, dim], float64 within."""
        plan = self.planned
        group = plan["num_qo_heads"] // plan["num_kv_heads"]
        k, v = (t.double().repeat_interleave(group, 1) for t in (k, v))
        logits = torch.einsum("qhd,khd->hqk", q.double(), k) * plan["sm_scale"]
        cap = plan.get("logits_soft_cap") or 0.0
        if cap > 0:
            logits = cap * torch.tanh(logits / cap)
        qo, kv = torch.meshgrid(
            torch.arange(len(q), device=q.device), torch.arange(len(k), device=q.device),
            indexing="ij",
        )  # fmt: skip
        # As in its kernels: causal masks are aligned to the right, the window is inclusive.
        mask = kv + len(q) <= len(k) + qo if plan.get("causal") else torch.ones_like(kv).bool()
        if plan.get("window_left", -1) >= 0:
            mask &= kv + len(q) + plan["window_left"] >= len(k) + qo
        weights = logits.masked_fill(~mask, float("-inf")).softmax(-1)
        return torch.einsum("hqk,khd->qhd", weights, v).to(q.dtype)


def _flat(cache: Tensor, pages: Tensor, length: int) -> Tensor:
    """[pages, kv heads, positions, dim] → the positions of some pages, [length, kv heads, dim]."""
    return cache[pages].transpose(1, 2).flatten(0, 1)[:length]


def install(monkeypatch: pytest.MonkeyPatch) -> type[BatchPrefillWithPagedKVCacheWrapper]:
    """Have `import flashinfer` find a module with a wrapper class of its own, which is returned."""
    made = type("Wrapper", (BatchPrefillWithPagedKVCacheWrapper,), {"plans": 0})
    module = ModuleType("flashinfer")
    module.__spec__ = ModuleSpec("flashinfer", None)
    module.BatchPrefillWithPagedKVCacheWrapper = made  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "flashinfer", module)
    return made
