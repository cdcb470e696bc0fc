"""A step's tokens, laid out without padding, on the host.

The new tokens of all sequences lie behind one another; where each lies in its sequence and in the
KV pages travels to the attention in an `AttentionStep`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from gossamer.engine.attention import AttentionStep

if TYPE_CHECKING:
    from gossamer.engine.scheduler import Work
    from gossamer.kernels.backends import Backend
    from gossamer.kernels.gpu.flash import FlashInferAttention


@dataclass(frozen=True, eq=False)
class Batch:
    """One step.

    Attributes:
        ids, positions, slots: int64 [rows]: the tokens, where each stands in its sequence, and
            where its key and value go (page * page_size + offset).
        query_start: int32 [sequences + 1].
        context_len: int32 [sequences].
        page_table: int32 [sequences, most pages], padded with 0.
        kv: per layer (k_pages, v_pages).
        backend: of the kernels.
    """

    ids: NDArray[np.int64]
    positions: NDArray[np.int64]
    slots: NDArray[np.int64]
    query_start: NDArray[np.int32]
    context_len: NDArray[np.int32]
    page_table: NDArray[np.int32]
    kv: list[tuple[Tensor, Tensor]]
    backend: Backend

    @classmethod
    def of(
        cls, work: Sequence[Work], page_size: int, kv: list[tuple[Tensor, Tensor]],
        backend: Backend, frame_of_page: NDArray[np.int64] | None = None,
    ) -> Batch:  # fmt: skip
        """The step that does this work; frame_of_page: where pages are, if not at their number."""
        counts = [w.count for w in work]
        total = sum(counts)
        width = max(len(w.sequence.pages) for w in work)
        flat = np.empty((3, total), np.int64)
        table = np.zeros((len(work), width), np.int32)
        start = 0
        for row, w in enumerate(work):
            end = start + w.count
            pages = np.asarray(w.sequence.pages, np.int64)
            pages = pages if frame_of_page is None else frame_of_page[pages]
            positions = np.arange(w.start, w.start + w.count)
            flat[0, start:end] = w.sequence.tokens[w.start : w.start + w.count]
            flat[1, start:end] = positions
            flat[2, start:end] = pages[positions // page_size] * page_size + positions % page_size
            table[row, : len(pages)] = pages
            start = end
        query_start = np.concatenate([[0], np.cumsum(counts)]).astype(np.int32)
        context = np.array([w.start + w.count for w in work], np.int32)
        ids, positions, slots = flat
        return cls(ids, positions, slots, query_start, context, table, kv, backend)

    @property
    def rows(self) -> int:
        """Tokens of the step."""
        return len(self.ids)

    @property
    def step(self) -> AttentionStep:
        """On the host."""
        return AttentionStep(
            kv=self.kv,
            slots=torch.from_numpy(self.slots),
            page_table=torch.from_numpy(self.page_table),
            query_start=torch.from_numpy(self.query_start),
            context_len=torch.from_numpy(self.context_len),
            backend=self.backend,
        )

    def to(
        self, device: torch.device, flash: FlashInferAttention | None = None
    ) -> tuple[Tensor, Tensor, AttentionStep]:
        """ids [1, rows], positions [1, rows] and the rest, on a device.

        flash: attends in place of the backend's kernel. It plans from the step on the host.
        """
        ids, positions = torch.from_numpy(self.ids)[None], torch.from_numpy(self.positions)[None]
        host = self.step
        step = host.to(device)
        if flash is not None:
            planned = flash.step(host.page_table, host.query_start, host.context_len)
            step = replace(step, flash=planned)
        return ids.to(device), positions.to(device), step
