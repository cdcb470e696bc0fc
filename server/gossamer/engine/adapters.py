"""From decoded deltas to what the kernels read: packed, and on a device copied there.

On the host an adapter is packed as the device reads it, in one pinned buffer, so that bringing it
in is one asynchronous copy on a stream of its own. Such buffers are kept for the next time, least
recently used first out (`HostTier`). Packing and copying happen in loader threads; the step waits
for none.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor

from gossamer.base.patch_map import PatchMap
from gossamer.engine.errors import DeviceFull
from gossamer.engine.frames import Move, Run
from gossamer.kernels import Backend, Coding, PackedDelta, Piece, pack, records, sides_of
from gossamer.store.delta import DeltaSet

#: Where buffers begin inside an adapter's one buffer, in bytes; the kernels read whole vectors.
_ALIGN = 128


@dataclass(frozen=True)
class Packed:
    """An adapter as the kernels read it.

    Attributes:
        deltas: by patched weight.
        table: int64 [patched weights, words] on the device: what a step's tables say of each
            (`gossamer.kernels.records`); None on the CPU, and until it is on the device.
        sides: of its tiles.
        buffer: uint8, what `deltas` and `table` are slices of; None on the CPU.
    """

    deltas: Mapping[str, PackedDelta]
    table: Tensor | None = None
    sides: tuple[int, ...] = ()
    buffer: Tensor | None = None

    @property
    def nbytes(self) -> int:
        """Bytes in memory."""
        if self.buffer is not None:
            return self.buffer.nbytes
        return sum(delta.nbytes for delta in self.deltas.values())


class HostTier:
    """Packed adapters in pinned memory of the host, up to a number of bytes. Thread-safe."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._lock = threading.Lock()
        self._kept: OrderedDict[str, Packed] = OrderedDict()
        self.nbytes = 0

    def get(self, key: str) -> Packed | None:
        """What was kept under a key; counts as a use."""
        with self._lock:
            if key in self._kept:
                self._kept.move_to_end(key)
            return self._kept.get(key)

    def put(self, key: str, packed: Packed) -> None:
        """Keep it, and let go of what was not used for longest. What is larger than all is not."""
        nbytes = _pinned_bytes(packed)
        with self._lock:
            if nbytes > self._limit or key in self._kept:
                return
            self._kept[key] = packed
            self.nbytes += nbytes
            while self.nbytes > self._limit:
                self.nbytes -= _pinned_bytes(self._kept.popitem(last=False)[1])

    def keys(self) -> list[str]:
        """What is kept, least recently used first."""
        with self._lock:
            return list(self._kept)


def _pinned_bytes(packed: Packed) -> int:
    """What torch takes for a pinned buffer: the next power of two."""
    pinned = packed.buffer is not None and packed.buffer.is_pinned()
    return 1 << (packed.nbytes - 1).bit_length() if pinned else packed.nbytes


class AdapterPacker:
    """Packs adapters for one patched model.

    Args:
        patch_map: of the model.
        backend: whose layout.
        coding: how values are stored.
        tier: keeps what was packed for a device; None on the CPU, where that is what is resident.
        pinned: whether copies to the device can be asynchronous.
    """

    def __init__(
        self, patch_map: PatchMap, backend: Backend, coding: Coding, tier: HostTier | None = None,
        *, pinned: bool = False,
    ) -> None:  # fmt: skip
        self._patch_map = patch_map
        self._backend = backend
        self._coding = coding
        self._pinned = pinned
        self.tier = tier

    def pack(self, key: str, decoded: Callable[[], DeltaSet]) -> Packed:
        """An adapter in memory of the host, as the device reads it; from the tier if it is there.

        Args:
            key: digest of what it says.
            decoded: reads and decodes it.

        Raises:
            ValueError: it is for another model.
            PackError: a position is out of range.
        """
        if self.tier is None:
            return Packed(self._packed(decoded()))
        found = self.tier.get(key)
        if found is None:
            found = self._in_one_buffer(self._packed(decoded()))
            self.tier.put(key, found)
        return found

    def _packed(self, deltas: DeltaSet) -> dict[str, PackedDelta]:
        """By patched weight."""
        pieces: dict[str, list[Piece]] = {}
        for name, delta in deltas.deltas.items():
            place = self._patch_map.places[name]
            shape = (place.rows, self._patch_map.weights[place.weight].in_features)
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
        weights = self._patch_map.weights
        return {
            name: pack(
                parts, weights[name].shape, len(weights[name].rows), self._backend, self._coding
            )
            for name, parts in pieces.items()
        }

    def _in_one_buffer(self, deltas: dict[str, PackedDelta]) -> Packed:
        """The same as slices of one buffer, which begins with room for the table."""
        start = _aligned(records([None] * len(self._patch_map.weights)).nbytes)
        total = start + sum(_aligned(delta.data.nbytes) for delta in deltas.values())
        buffer = torch.empty(total, dtype=torch.uint8, pin_memory=self._pinned)
        placed = {}
        for name, delta in deltas.items():
            part = buffer[start : start + delta.data.nbytes]
            placed[name] = delta.moved(part.copy_(delta.data))
            start += _aligned(delta.data.nbytes)
        return Packed(placed, sides=sides_of(deltas.values()), buffer=buffer)


class DeviceFrames:
    """The device's block of memory, as adapters and pages see it (`frames`).

    Args:
        block: uint8 [frames, bytes of a frame], on the device.
        names: of the patched weights, in the order of the kernels' tables.
    """

    def __init__(self, block: Tensor, names: Sequence[str]) -> None:
        self._block = block
        self._names = tuple(names)
        on_device = block.device.type == "cuda"
        self._stream = torch.cuda.Stream(block.device) if on_device else None
        self._lock = threading.Lock()  # of the packed buffers, whose tables are written here

    def move(self, moves: Sequence[Move]) -> None:
        """Copy frames aside. In the engine's thread, between two steps."""
        if not moves:
            return
        sources = torch.tensor([m.source for m in moves], device=self._block.device)
        targets = torch.tensor([m.target for m in moves], device=self._block.device)
        self._block[targets] = self._block[sources]
        if self._stream is not None:
            # What is copied into these frames next is copied by another stream.
            torch.cuda.current_stream(self._block.device).synchronize()

    def place(self, key: str, packed: Packed, run: Run) -> Packed:
        """Copy an adapter into its frames; it is there when this returns. In a loader thread.

        Raises:
            DeviceFull: the device has no room, in spite of the budget.
        """
        try:
            return self._placed(packed, run)
        except torch.OutOfMemoryError as cause:
            raise DeviceFull(key, cause) from cause

    def _placed(self, packed: Packed, run: Run) -> Packed:
        source = cast(Tensor, packed.buffer)
        target = self._block[run.first : run.first + run.count].view(-1)[: source.nbytes]
        deltas = {
            name: delta.moved(target[delta.data.storage_offset() :][: delta.data.nbytes])
            for name, delta in packed.deltas.items()
        }
        table = records([deltas.get(name) for name in self._names])
        words = table.view(torch.uint8).view(-1)
        with self._lock:
            source[: len(words)] = words
            if self._stream is None:
                target.copy_(source)
            else:
                with torch.cuda.stream(self._stream):
                    target.copy_(source, non_blocking=True)
                    arrived = self._stream.record_event()
                arrived.synchronize()
        head = target[: len(words)].view(torch.int64).view(table.shape)
        return Packed(deltas, head, packed.sides, target)


def _aligned(nbytes: int) -> int:
    return -(-nbytes // _ALIGN) * _ALIGN
