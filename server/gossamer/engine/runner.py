"""One step of the model: from the scheduler's work to logits.

The batch is ragged: the new tokens of all sequences lie in one row of ids [1, tokens], without
padding; where each lies in its sequence travels to the attention in an `AttentionStep`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from gossamer.base.patch_map import PatchMap
from gossamer.engine.attention import NAME, AttentionStep
from gossamer.engine.patched import PatchedLinear, StepDeltas, patch
from gossamer.engine.replays import StackReplays
from gossamer.engine.residency import Applied, Resident
from gossamer.engine.short_modules import LayerStack
from gossamer.engine.shortcuts import shorten
from gossamer.kernels import PackedDelta, Piece, Saved, WorkPlan, bind, fuse_into, pack, restore
from gossamer.kernels.attention import kv_page_bytes, new_kv_pages
from gossamer.kernels.scatter import rounding

if TYPE_CHECKING:
    from gossamer.engine.config import EngineConfig
    from gossamer.engine.scheduler import Work
    from gossamer.store.delta import DeltaSet


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

    def page_bytes(self, page_size: int, dtype: torch.dtype) -> int:
        """Bytes of one page, keys and values of all layers."""
        return self.layers * kv_page_bytes(page_size, self.kv_heads, self.head_dim, dtype)


class Runner:
    """Owns the patched model, the KV pages' tensors and what is fused into the weights."""

    def __init__(self, model: PreTrainedModel, num_pages: int, config: EngineConfig) -> None:
        self.patch_map = PatchMap.of(model)
        self._config = config
        self._deltas = StepDeltas()
        self._products = patch(model, self.patch_map, self._deltas, config.kernels)
        shorten(model, config.kernels)
        model.set_attn_implementation(NAME)
        self._model = model
        self._device = model.device
        self.page_size, self.num_pages = config.page_size, num_pages
        g = Geometry.of(model)
        # Not zeroed: on a CPU, pages that were never used then cost no memory.
        self._kv = [
            new_kv_pages(
                num_pages, config.page_size, g.kv_heads, g.head_dim, model.dtype, model.device
            )
            for _ in range(g.layers)
        ]
        for module in model.modules():
            if isinstance(module, LayerStack) and config.kernels != "reference":
                # A compiled mix may add a correction to its members.
                module.replays = StackReplays(
                    self._deltas, self._products, config.max_members + 1, config.kernels
                )
        self._active: tuple[str, ...] = ()
        self._saved: list[tuple[Tensor, Saved]] = []

    # -- adapters

    def pack(self, deltas: DeltaSet) -> dict[str, PackedDelta]:
        """A decoded adapter in the device's layout, by patched weight. Called in loader threads."""
        pieces: dict[str, list[Piece]] = {}
        for name, delta in deltas.deltas.items():
            place = self.patch_map.places[name]
            shape = (place.rows, self.patch_map.weights[place.weight].in_features)
            if delta.shape != shape:
                raise ValueError(f"{name} has shape {shape}, the adapter's delta {delta.shape}")
            pieces.setdefault(place.weight, []).append(
                Piece(
                    kind=delta.kind,
                    projection=place.projection,
                    row_offset=place.row_offset,
                    rows=place.rows,
                    block_size=delta.block_size,
                    positions=torch.from_numpy(delta.positions),
                    values=torch.from_numpy(delta.values_f32()),
                )
            )
        weights = self.patch_map.weights
        return {
            name: pack(parts, weights[name].shape, len(weights[name].rows), self._config.kernels)
            for name, parts in pieces.items()
        }

    def fuse(self, applied: Applied, residents: Sequence[Resident]) -> None:
        """Add a mix into the weights.

        An exception leaves the base as it was, or, if that failed as well, for `unfuse` to restore.
        """
        if self._saved:
            raise RuntimeError("a mix is fused already")
        try:
            for linear, deltas, weights in self._written(applied, residents):
                weight, transposed = linear.weight.data, linear.transposed
                saved = fuse_into(weight, deltas, weights, transposed, self._config.kernels)
                self._saved.append((weight, saved))
        except BaseException:
            self.unfuse()
            raise

    def unfuse(self) -> None:
        """Put the base's weights back, bit for bit. After an exception it can be called again."""
        while self._saved:
            weight, saved = self._saved[-1]
            restore(weight, saved)
            self._saved.pop()

    def deviation(self, applied: Applied, residents: Sequence[Resident]) -> float:
        """‖fl(W + Δ) - (W + Δ)‖ / ‖Δ‖ over all that fusing a mix would write, fl the base's dtype.

        How far the fused model is from the mix, in units of the mix itself. As long as a few decode
        steps (see `rounding`); the base must not be fused.
        """
        error = norm = 0.0
        for linear, deltas, weights in self._written(applied, residents):
            lost, size = rounding(linear.weight.data, deltas, weights, linear.transposed)
            error, norm = error + lost, norm + size
        return math.sqrt(error / norm) if norm else 0.0

    def _written(
        self, applied: Applied, residents: Sequence[Resident]
    ) -> Iterator[tuple[PatchedLinear, list[PackedDelta], Tensor]]:
        """Per patched weight that a mix touches: its members' deltas and their weights [M, 1]."""
        for name, linear in self._products.items():
            members = [
                (r.deltas[name], weight)
                for r, (_, weight) in zip(residents, applied, strict=True)
                if name in r.deltas
            ]
            if members:
                weights = torch.tensor([[weight] for _, weight in members])
                yield linear, [delta for delta, _ in members], weights

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
        ids, positions, step = self._batch(work, counts)
        ends = np.cumsum(counts)
        everything = set(scored)
        wanted = np.concatenate(
            [
                np.arange(end - count if i in everything else end - 1, end)
                for i, (end, count) in enumerate(zip(ends, counts, strict=True))
            ]
        )
        with torch.inference_mode():
            out = self._model(
                input_ids=ids,
                position_ids=positions,
                use_cache=False,
                logits_to_keep=torch.from_numpy(wanted).to(self._device),
                step=step,
            )
        logits: Tensor = out.logits[0]
        return logits.float()

    def _set_deltas(
        self, counts: list[int], applied: Sequence[Applied], residents: dict[str, Resident]
    ) -> None:
        keys = tuple(sorted({key for pairs in applied for key, _ in pairs}))
        if not keys:
            self.forget_bound()
            return
        if keys != self._active:
            self._bind(keys, residents)
        slot = {key: i for i, key in enumerate(keys)}
        runs = [
            (count, tuple(slot[key] for key, _ in pairs))
            for count, pairs in zip(counts, applied, strict=True)
        ]
        weights = np.zeros((len(applied), max(len(pairs) for pairs in applied), 1), np.float32)
        for row, pairs in enumerate(applied):
            weights[row, : len(pairs), 0] = [weight for _, weight in pairs]
        self._deltas.plan = WorkPlan.build(runs=runs)
        self._deltas.weights = torch.from_numpy(weights.repeat(counts, axis=0)).to(self._device)

    def _bind(self, keys: tuple[str, ...], residents: dict[str, Resident]) -> None:
        slots = [residents[key].deltas for key in keys]
        changed = {name for deltas in slots for name in deltas}
        self._deltas.bound = {
            name: bind([deltas.get(name) for deltas in slots], self.patch_map.weights[name].shape)
            for name in changed
        }
        self._deltas.version += 1
        self._active = keys

    def forget_bound(self) -> None:
        """Drop references to deltas that no row uses, so that eviction frees them."""
        self._deltas.plan, self._deltas.weights, self._deltas.bound = None, None, {}
        self._active = ()

    def _batch(
        self, work: Sequence[Work], counts: list[int]
    ) -> tuple[Tensor, Tensor, AttentionStep]:
        size = self.page_size
        total, rows = sum(counts), len(work)
        width = max(len(w.sequence.pages) for w in work)
        # One buffer and one copy to the device for ids, positions and slots of the tokens.
        flat = np.empty((3, total), np.int64)
        table = np.zeros((rows, width), np.int32)
        start = 0
        for row, w in enumerate(work):
            end = start + w.count
            pages = np.asarray(w.sequence.pages, np.int64)
            positions = np.arange(w.start, w.start + w.count)
            flat[0, start:end] = w.sequence.tokens[w.start : w.start + w.count]
            flat[1, start:end] = positions
            flat[2, start:end] = pages[positions // size] * size + positions % size
            table[row, : len(pages)] = pages
            start = end
        tokens = torch.from_numpy(flat).to(self._device)
        query_start = np.concatenate([[0], np.cumsum(counts)]).astype(np.int32)
        context = np.array([w.start + w.count for w in work], np.int32)
        step = AttentionStep(
            kv=self._kv,
            slots=tokens[2],
            page_table=torch.from_numpy(table).to(self._device),
            query_start=torch.from_numpy(query_start).to(self._device),
            context_len=torch.from_numpy(context).to(self._device),
            backend=self._config.kernels,
        )
        return tokens[0:1], tokens[1:2], step
