"""Paged attention by FlashInfer, an optional package, in place of this package's own kernel.

FlashInfer cuts a step into work items on the host ("plan") and then computes any number of layers
with them ("run"). Layers with the same heads, scale, window and soft cap share a plan, so a model
costs as many plans a step as it has kinds of layers: one, or two where windows alternate.

A plan reads the step on the host, so a captured program cannot hold it.

Source: Ye et al., FlashInfer (2025); `BatchPrefillWithPagedKVCacheWrapper` of flashinfer-python
0.7.2, whose sources this file was written against.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from gossamer.kernels.errors import BackendUnavailableError, IndexRangeError, ShapeError

#: Widths of a head that both of its generations of kernels have (fa2; fa3 on Hopper).
HEAD_DIMS = (64, 128, 256)
DTYPES = (torch.float16, torch.bfloat16)
#: Scratch for the parts of cut contexts: what FlashInfer recommends. It cuts only until there are
#: two work items a multiprocessor, of at most 128 rows: 2 · 132 · 128 · 256 float32 are 33 MiB.
WORKSPACE_BYTES = 128 << 20


def why_not(dtype: torch.dtype, head_dim: int | None = None) -> str | None:
    """Why FlashInfer cannot attend in this process with such heads; None: it can.

    Imports it, which takes seconds. Whether it has a compiler for its kernels shows when they run.

    Args:
        dtype: of queries, keys and values.
        head_dim: width of a head; None leaves it out.
    """
    if torch.version.hip is not None:
        return "FlashInfer's kernels are for NVIDIA's devices only"
    if dtype not in DTYPES:
        return f"FlashInfer takes {' or '.join(_name(d) for d in DTYPES)}, not {_name(dtype)}"
    if head_dim is not None and head_dim not in HEAD_DIMS:
        widths = ", ".join(map(str, HEAD_DIMS))
        return f"FlashInfer takes heads of width {widths}, not {head_dim}"
    try:
        importlib.import_module("flashinfer")
    except ModuleNotFoundError as error:
        if error.name == "flashinfer":
            return "FlashInfer is not installed (pip install 'gossamer[flashinfer]')"
        return f"FlashInfer cannot be imported: {error}"
    except ImportError as error:
        return f"FlashInfer cannot be imported: {error}"
    return None


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


@dataclass(frozen=True)
class LayerKind:
    """What a plan depends on beside the step."""

    heads: int
    kv_heads: int
    scale: float
    sliding_window: int | None
    softcap: float | None


class FlashInferAttention:
    """FlashInfer's wrappers and their memory; for the steps of one model, one after the other.

    Every kind of layer has a wrapper, because a wrapper holds one plan (and 8 MiB on the device,
    8 MiB pinned). The scratch is shared: it is in use only while a layer runs.

    Args:
        head_dim: width of a head.
        page_size: positions of a KV page.
        dtype: of queries, keys and values.
        device: where they are.

    Raises:
        BackendUnavailableError: see `why_not`.
    """

    def __init__(
        self, head_dim: int, page_size: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        reason = why_not(dtype, head_dim)
        if reason is not None:
            raise BackendUnavailableError("flashinfer", reason)
        self.head_dim, self.page_size, self.dtype = head_dim, page_size, dtype
        self._device = device
        self._workspace = torch.empty(WORKSPACE_BYTES, dtype=torch.uint8, device=device)
        self._wrappers: dict[LayerKind, Any] = {}

    def wrapper(self, kind: LayerKind) -> Any:
        """The wrapper for layers of a kind; its plan is that of the step that planned last."""
        made = self._wrappers.get(kind)
        if made is None:
            flashinfer = importlib.import_module("flashinfer")
            # Left to choose, it takes fa3 on Hopper and fa2 elsewhere.
            made = flashinfer.BatchPrefillWithPagedKVCacheWrapper(self._workspace, kv_layout="HND")
            self._wrappers[kind] = made
        return made

    def step(self, page_table: Tensor, query_start: Tensor, context_len: Tensor) -> FlashInferStep:
        """The layers' attention of one step; it ends with the next call, which plans anew.

        A wrapper's plan travels to the device from one pinned buffer, asynchronously, and the next
        plan is written into that buffer. So this waits for what the device is still doing: nothing,
        where the caller has copied the step there before, as blocking copies wait as well.

        Args:
            page_table: int32 [sequences, most pages] on the host, the pages of each sequence in
                order. Entries behind its context are ignored.
            query_start: int32 [sequences + 1] on the host, from 0, not decreasing.
            context_len: int32 [sequences] on the host, each sequence's length with this step.

        Raises:
            ShapeError: a shape, dtype or device does not fit.
            IndexRangeError: the query starts decrease, a sequence has more rows than positions or
                more positions than pages.
        """
        if self._device.type == "cuda":
            torch.cuda.current_stream(self._device).synchronize()
        return FlashInferStep(self, paged_rows(page_table, query_start, context_len, self))


@dataclass(frozen=True)
class PagedRows:
    """A step as FlashInfer reads it, all int32 on the host.

    Attributes:
        qo_indptr: [sequences + 1], where each sequence's rows begin.
        kv_indptr: [sequences + 1], where each sequence's pages begin in `kv_indices`.
        kv_indices: [pages of all sequences].
        last_page_len: [sequences], positions in each sequence's last page.
        rows: of the step.
        low, high: the least and the greatest page.
    """

    qo_indptr: Tensor
    kv_indptr: Tensor
    kv_indices: Tensor
    last_page_len: Tensor
    rows: int
    low: int
    high: int


def paged_rows(
    page_table: Tensor, query_start: Tensor, context_len: Tensor, owner: FlashInferAttention
) -> PagedRows:
    """See `FlashInferAttention.step`."""
    sequences = len(context_len)
    wanted = (("page_table", page_table, (sequences, page_table.shape[-1])),
              ("query_start", query_start, (sequences + 1,)),
              ("context_len", context_len, (sequences,)))  # fmt: skip
    for name, tensor, shape in wanted:
        if tensor.shape != shape or tensor.dtype is not torch.int32 or tensor.is_cuda:
            got = (tensor.dtype, tuple(tensor.shape), tensor.device.type)
            raise ShapeError(name, f"int32 {list(shape)} on the host", got)
    rows = query_start.diff()
    if sequences and (int(query_start[0]) != 0 or bool((rows < 0).any())):
        raise IndexRangeError("query_start", int(query_start[-1]) + 1)
    width = page_table.shape[1]
    if bool((context_len < rows).any()) or bool((context_len > width * owner.page_size).any()):
        raise IndexRangeError("context_len", width * owner.page_size + 1)
    pages = (context_len + (owner.page_size - 1)) // owner.page_size
    used = page_table[torch.arange(width) < pages[:, None]]
    kv_indptr = torch.zeros(sequences + 1, dtype=torch.int32)
    kv_indptr[1:] = pages.cumsum(0)
    return PagedRows(
        qo_indptr=query_start,
        kv_indptr=kv_indptr,
        kv_indices=used,
        last_page_len=context_len - (pages - 1).clamp(min=0) * owner.page_size,
        rows=int(query_start[-1]),
        low=int(used.min()) if len(used) else 0,
        high=int(used.max()) if len(used) else 0,
    )


class FlashInferStep:
    """The attention of one step's layers. Made by `FlashInferAttention.step`."""

    def __init__(self, owner: FlashInferAttention, paged: PagedRows) -> None:
        self._owner = owner
        self._paged = paged
        self._planned: dict[LayerKind, Callable[..., Tensor]] = {}

    def run(
        self,
        q: Tensor,
        k_pages: Tensor,
        v_pages: Tensor,
        *,
        scale: float,
        sliding_window: int | None = None,
        softcap: float | None = None,
    ) -> Tensor:
        """Semantics: those of `gossamer.kernels.attention.paged_attention`.

        But a long context is cut by how busy the device is, so a row's last bits may depend on its
        neighbours. The first layer of a kind plans; the host waits for nothing.

        Args:
            q: [T, Hq, D], last dimension contiguous.
            k_pages, v_pages: [pages, Hkv, page_size, D], of contiguous pages with the same strides,
                as "triton" has them; the pages of a layer may lie apart.
            scale, sliding_window, softcap: as there.

        Returns:
            [T, Hq, D], contiguous, in q's dtype.

        Raises:
            ShapeError: a shape, dtype or stride does not fit.
            IndexRangeError: the page table points outside the pages; nothing was launched.
        """
        self._check(q, k_pages, v_pages)
        kind = LayerKind(q.shape[1], k_pages.shape[1], scale, sliding_window, softcap)
        run = self._planned.get(kind)
        if run is None:
            run = self._planned[kind] = self._plan(kind)
        out: Tensor = run(q, (k_pages, v_pages), out=q.new_empty(q.shape))
        return out

    def _plan(self, kind: LayerKind) -> Callable[..., Tensor]:
        owner, paged = self._owner, self._paged
        wrapper = owner.wrapper(kind)
        wrapper.plan(
            paged.qo_indptr,
            paged.kv_indptr,
            paged.kv_indices,
            paged.last_page_len,
            kind.heads,
            kind.kv_heads,
            owner.head_dim,
            owner.page_size,
            causal=True,
            sm_scale=kind.scale,
            # How many positions a row sees before its own; our window counts its own as well.
            window_left=-1 if kind.sliding_window is None else kind.sliding_window - 1,
            logits_soft_cap=kind.softcap,
            q_data_type=owner.dtype,
            kv_data_type=owner.dtype,
        )
        run: Callable[..., Tensor] = wrapper.run
        return run

    def _check(self, q: Tensor, k_pages: Tensor, v_pages: Tensor) -> None:
        owner, paged = self._owner, self._paged
        size, dim = owner.page_size, owner.head_dim
        if k_pages.ndim != 4:
            raise ShapeError("k_pages", "[pages, kv heads, page_size, D]", tuple(k_pages.shape))
        pages, kv_heads = k_pages.shape[:2]
        if (
            q.ndim != 3
            or q.shape != (paged.rows, q.shape[1], dim)
            or q.shape[1] % kv_heads
            or q.dtype is not owner.dtype
            or q.stride(2) != 1
        ):
            wanted = f"{owner.dtype} [{paged.rows}, n * {kv_heads}, {dim}]"
            raise ShapeError("q", wanted, (q.dtype, tuple(q.shape), q.stride()))
        for name, tensor in (("k_pages", k_pages), ("v_pages", v_pages)):
            if (
                tensor.shape != (pages, kv_heads, size, dim)
                or tensor.dtype is not owner.dtype
                or tensor.stride() != (k_pages.stride(0), size * dim, dim, 1)
            ):
                wanted = f"{owner.dtype} [pages, kv heads, {size}, {dim}], of contiguous pages"
                raise ShapeError(name, wanted, (tensor.dtype, tuple(tensor.shape), tensor.stride()))
        if paged.low < 0 or paged.high >= pages:
            raise IndexRangeError("page_table", pages)
