"""The engine's attention behind transformers' `AttentionInterface`.

The step's metadata travels as a keyword argument of `model(...)`, which transformers passes down
to the attention function; there is no global state.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface

from gossamer.engine.errors import UnsupportedModel
from gossamer.kernels.attention import paged_attention, write_kv
from gossamer.kernels.backends import Backend

if TYPE_CHECKING:
    from gossamer.kernels.gpu.flash import FlashInferStep

NAME = "gossamer_paged"


@dataclass(frozen=True)
class AttentionStep:
    """Where the rows of a step lie in their sequences and in the KV pages.

    Attributes:
        kv: per layer (k_pages, v_pages).
        slots: int64 [rows], page * page_size + offset where each row's key and value go.
        page_table: int32 [sequences, most pages], padded with 0.
        query_start: int32 [sequences + 1], rows of a sequence are [start, next start).
        context_len: int32 [sequences], tokens stored after this step.
        backend: of the kernels.
        flash: FlashInfer's attention for this step; None: the backend's own.
    """

    kv: list[tuple[Tensor, Tensor]]
    slots: Tensor
    page_table: Tensor
    query_start: Tensor
    context_len: Tensor
    backend: Backend
    flash: FlashInferStep | None = None

    def to(self, device: torch.device) -> AttentionStep:
        """The same on a device, where the pages are already."""
        names = ("slots", "page_table", "query_start", "context_len")
        return replace(self, **{name: getattr(self, name).to(device) for name in names})


def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float,
    step: AttentionStep,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    position_ids: Tensor | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """Store this step's keys and values, then attend over each row's own sequence.

    query [1, heads, rows, dim], key and value [1, kv heads, rows, dim] → [1, rows, heads, dim].
    Raises `UnsupportedModel` for an argument that would change the result and is not known here.
    """
    del attention_mask, position_ids
    unknown = sorted(name for name, value in others.items() if matters(name, value))
    if unknown or dropout:
        names = ", ".join(unknown or ["dropout"])
        raise UnsupportedModel(type(module).__name__, f"its attention takes {names}")
    layer: int = module.layer_idx  # type: ignore[assignment]
    k, v = key[0].transpose(0, 1), value[0].transpose(0, 1)
    write_kv(k, v, *step.kv[layer], step.slots, backend=step.backend)
    rows = query[0].transpose(0, 1)
    out = attend_rows(
        rows, layer, step, scaling=scaling, sliding_window=sliding_window, softcap=softcap
    )
    return out[None], None


def attend_rows(
    query: Tensor,
    layer: int,
    step: AttentionStep,
    *,
    scaling: float,
    sliding_window: int | None = None,
    softcap: float | None = None,
) -> Tensor:
    """Attention of query [rows, heads, dim] over the pages of `layer`, the step's own included."""
    k_pages, v_pages = step.kv[layer]
    if step.flash is not None:
        return step.flash.run(
            query,
            k_pages,
            v_pages,
            scale=scaling,
            sliding_window=sliding_window,
            softcap=softcap,
        )
    return paged_attention(
        query,
        k_pages,
        v_pages,
        step.page_table,
        step.query_start,
        step.context_len,
        scale=scaling,
        sliding_window=sliding_window,
        softcap=softcap,
        backend=step.backend,
    )


#: Keyword arguments that transformers hands through and that do not change the result.
_HARMLESS = frozenset(
    {
        "use_cache",
        "output_attentions",
        "output_hidden_states",
        "return_dict",
        "is_causal",
        "cache_position",
        "deterministic",
        "target_dtype",
    }
)


def matters(name: str, value: object) -> bool:
    """Whether an argument of an attention function can change its result."""
    return value is not None and name not in _HARMLESS


AttentionInterface.register(NAME, attend)
