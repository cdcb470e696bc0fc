"""One step of the model: from the scheduler's work to logits."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedModel

from gossamer.base.patch_map import PatchMap
from gossamer.engine.adapters import AdapterPacker, DeviceFrames, HostTier
from gossamer.engine.attention import NAME, AttentionStep
from gossamer.engine.batch import Batch
from gossamer.engine.binding import Binding, DeviceBinding, HostBinding
from gossamer.engine.graphs import DecodeGraphs, padded_rows
from gossamer.engine.patched import StepDeltas, patch
from gossamer.engine.replays import StackReplays
from gossamer.engine.residency import Applied, Resident
from gossamer.engine.short_modules import LayerStack
from gossamer.engine.shortcuts import shorten
from gossamer.kernels import (
    EXACT_CODINGS,
    Backend,
    Coding,
    NotRestoredError,
    Saved,
    Target,
    WorkPlan,
    fuse_into,
    restore,
    rounding,
)
from gossamer.kernels.attention import framed_kv_pages, kv_page_bytes, new_kv_pages
from gossamer.kernels.gpu.flash import FlashInferAttention

if TYPE_CHECKING:
    from gossamer.engine.config import EngineConfig
    from gossamer.engine.scheduler import Work


@dataclass(frozen=True)
class Geometry:
    """The sizes of a base's KV cache."""

    layers: int
    kv_heads: int
    head_dim: int

    @classmethod
    def of(cls, model: PreTrainedModel) -> Geometry:
        """Read them off the model's configuration."""
        config = model.config.get_text_config()
        heads = config.num_attention_heads
        kv_heads = getattr(config, "num_key_value_heads", None) or heads
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
        return cls(config.num_hidden_layers, kv_heads, head_dim)

    def page_bytes(self, page_size: int, dtype: torch.dtype, backend: Backend) -> int:
        """Bytes of one page, keys and values of all layers."""
        return self.layers * kv_page_bytes(page_size, self.kv_heads, self.head_dim, dtype, backend)


class Runner:
    """Owns the patched model, the KV pages' tensors and what is fused into the weights.

    Args:
        model: is rebuilt in place.
        num_pages: of KV.
        config: limits and policy.
        frame_of_page: int64 [num_pages], where each page is; None: where its number says.

    Attributes:
        adapters: packs them for this model.
        frames: the device's block of memory; None on the CPU.

    Raises:
        BackendUnavailableError: FlashInfer was asked for and cannot attend for this model.
    """

    def __init__(
        self, model: PreTrainedModel, num_pages: int, config: EngineConfig,
        frame_of_page: NDArray[np.int64] | None = None,
    ) -> None:  # fmt: skip
        self.patch_map = PatchMap.of(model)
        self._config = config
        self._deltas = StepDeltas()
        self._products = patch(model, self.patch_map, self._deltas, config.kernels)
        shorten(model, config.kernels)
        model.set_attn_implementation(NAME)
        self._model = model
        self._device = model.device
        self.page_size, self.num_pages = config.page_size, num_pages
        self._frame_of_page = frame_of_page
        self.frames: DeviceFrames | None = None
        geometry = Geometry.of(model)
        self._kv = self._new_pages(geometry, num_pages)
        self._flash: FlashInferAttention | None = None
        if config.attention == "flashinfer":
            self._flash = FlashInferAttention(
                geometry.head_dim, config.page_size, model.dtype, self._device
            )
        for module in model.modules():
            if isinstance(module, LayerStack) and config.kernels == "cpu":
                # A compiled mix may add a correction to its members.
                module.replays = StackReplays(
                    self._deltas, self._products, config.max_members + 1, config.kernels
                )
        self._binding = self._new_binding()
        tier = HostTier(config.host_bytes) if config.kernels == "triton" else None
        self.adapters = AdapterPacker(
            self.patch_map, config.kernels, self._coding, tier,
            pinned=self._device.type == "cuda",
        )  # fmt: skip
        self._graphs: DecodeGraphs | None = None
        if config.kernels == "triton" and config.graphs:
            self._graphs = DecodeGraphs(
                self._forward, self._deltas, config.max_members + 1, config.kernels, self._device
            )
        self._saved: Saved | None = None

    def _new_pages(self, g: Geometry, num_pages: int) -> list[tuple[Tensor, Tensor]]:
        """KV pages of all layers. Not zeroed: on a CPU, what was never used takes no memory."""
        config, dtype = self._config, self._model.dtype
        if config.kernels == "triton":
            frame = g.page_bytes(config.page_size, dtype, config.kernels)
            block = torch.empty(num_pages, frame, dtype=torch.uint8, device=self._device)
            self.frames = DeviceFrames(block, tuple(self.patch_map.weights))
            return framed_kv_pages(
                block.view(-1), g.layers, config.page_size, g.kv_heads, g.head_dim, dtype
            )
        return [
            new_kv_pages(
                num_pages, config.page_size, g.kv_heads, g.head_dim, dtype, self._device,
                config.kernels,
            )
            for _ in range(g.layers)
        ]  # fmt: skip

    @property
    def _coding(self) -> Coding:
        """How adapters' values are stored."""
        if self._config.kernels != "triton":
            return "float32"
        return "int8" if self._config.int8_adapters else EXACT_CODINGS[self._model.dtype]

    def _new_binding(self) -> Binding:
        weights, config = self.patch_map.weights, self._config
        if config.kernels != "triton":
            return HostBinding(weights, config.kernels)
        # A graph's plan has room for the rows that a step is padded to.
        rows = padded_rows(config.max_rows) or config.max_rows
        slots = rows * (config.max_members + 1)
        return DeviceBinding(weights, self._coding, slots, self._device)

    def wait(self) -> None:
        """Until everything launched has run."""
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)

    # -- fusing

    def fuse(self, applied: Applied, residents: Sequence[Resident]) -> None:
        """Add a mix into the weights.

        An exception leaves the base as it was, or, if that failed as well, for `unfuse` to restore.
        """
        if self._saved is not None:
            raise RuntimeError("a mix is fused already")
        try:
            targets = list(self._targets(applied, residents))
            self._saved = fuse_into(targets, self._config.kernels)
        except NotRestoredError as error:
            self._saved = error.saved
            raise

    def unfuse(self) -> None:
        """Put the base's weights back, bit for bit. After an exception it can be called again."""
        if self._saved is not None:
            restore(self._saved)
            self._saved = None

    def deviation(self, applied: Applied, residents: Sequence[Resident]) -> float:
        """‖fl(W + Δ) - (W + Δ)‖ / ‖Δ‖ over all that fusing a mix would write, fl the base's dtype.

        How far the fused model is from the mix, in units of the mix itself. As long as a few decode
        steps (see `rounding`); the base must not be fused.
        """
        error = norm = 0.0
        for target in self._targets(applied, residents):
            lost, size = rounding(target, self._config.kernels)
            error, norm = error + lost, norm + size
        return math.sqrt(error / norm) if norm else 0.0

    def _targets(self, applied: Applied, residents: Sequence[Resident]) -> Iterator[Target]:
        """The patched weights that a mix touches."""
        for name, linear in self._products.items():
            members = [
                (r.deltas[name], weight)
                for r, (_, weight) in zip(residents, applied, strict=True)
                if name in r.deltas
            ]
            if members:
                weights = torch.tensor([[weight] for _, weight in members])
                deltas = [delta for delta, _ in members]
                yield Target(linear.weight.data, deltas, weights, linear.transposed)

    # -- a step

    def run(
        self,
        work: Sequence[Work],
        applied: Sequence[Applied],
        residents: dict[str, Resident],
        scored: Iterable[int] = (),
    ) -> Tensor:
        """Compute the new tokens of every sequence of the step.

        Args:
            work: sequences with pages for all their tokens.
            applied: per work, the (key, weight) pairs its rows add; () for the base, or for a mix
                that is fused.
            residents: key → deltas, for every key in `applied`.
            scored: indices of works whose every row's logits are wanted (prompt log-probabilities).

        Returns:
            float32 logits: per work in order, those of its last row, or of all its rows if scored.
        """
        counts = [w.count for w in work]
        self._set_deltas(counts, applied, residents)
        batch = Batch.of(work, self.page_size, self._kv, self._config.kernels, self._frame_of_page)
        everything = set(scored)
        if self._graphs is not None and not everything and batch.rows == len(work):
            logits = self._graphs.run(batch)
            if logits is not None:
                return logits.float()
        ends = np.cumsum(counts)
        wanted = np.concatenate(
            [
                np.arange(end - count if i in everything else end - 1, end)
                for i, (end, count) in enumerate(zip(ends, counts, strict=True))
            ]
        )
        keep = torch.from_numpy(wanted).to(self._device)
        with self._deltas.replaced(self._deltas.on(self._device)):
            return self._forward(*batch.to(self._device, self._flash), keep).float()

    def _forward(
        self, ids: Tensor, positions: Tensor, step: AttentionStep, keep: Tensor | int = 0
    ) -> Tensor:
        """ids and positions [1, rows] → logits [rows, or those of `keep`, vocabulary]."""
        with torch.inference_mode():
            out = self._model(
                input_ids=ids,
                position_ids=positions,
                use_cache=False,
                logits_to_keep=keep,
                step=step,
            )
        logits: Tensor = out.logits[0]
        return logits

    def _set_deltas(
        self, counts: list[int], applied: Sequence[Applied], residents: dict[str, Resident]
    ) -> None:
        keys = sorted({key for pairs in applied for key, _ in pairs})
        if not keys:
            self.forget_bound()
            return
        bound = self._binding.bind(keys, residents)
        runs = [
            (count, tuple(bound.slots[key] for key, _ in pairs))
            for count, pairs in zip(counts, applied, strict=True)
        ]
        weights = np.zeros((len(applied), max(len(pairs) for pairs in applied), 1), np.float32)
        for row, pairs in enumerate(applied):
            weights[row, : len(pairs), 0] = [weight for _, weight in pairs]
        deltas = self._deltas
        deltas.plan = WorkPlan.build(runs=runs)
        deltas.weights = torch.from_numpy(weights.repeat(counts, axis=0))
        deltas.bound, deltas.version, deltas.sides = bound.deltas, bound.version, bound.sides

    def forget_bound(self) -> None:
        """Drop references to deltas that no row uses, so that eviction frees them."""
        self._deltas.forget()
        self._binding.forget()
