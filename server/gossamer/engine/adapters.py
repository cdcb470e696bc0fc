"""From decoded deltas to what the kernels read: packed, and on a device copied there.

On the host an adapter is packed as the device reads it, in one pinned buffer, so that bringing it
in is one asynchronous copy on a stream of its own. Such buffers are kept for the next time, least
recently used first out (`HostTier`). All of it runs in loader threads; the step waits for none.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from gossamer.base.patch_map import PatchMap
from gossamer.engine.errors import DeviceFull
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
            (`gossamer.kernels.records`); None on the CPU.
        sides: of its tiles.
    """

    deltas: Mapping[str, PackedDelta]
    table: Tensor | None = None
    sides: tuple[int, ...] = ()

    @property
    def nbytes(self) -> int:
        """Bytes in memory."""
        table = 0 if self.table is None else self.table.nbytes
        return table + sum(delta.nbytes for delta in self.deltas.values())


class HostTier:
    """Packed adapters in pinned memory of the host, up to a number of bytes. Thread-safe."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._lock = threading.Lock()
        self._kept: OrderedDict[str, dict[str, PackedDelta]] = OrderedDict()
        self.nbytes = 0

    def get(self, key: str) -> dict[str, PackedDelta] | None:
        """What was kept under a key; counts as a use."""
        with self._lock:
            if key in self._kept:
                self._kept.move_to_end(key)
            return self._kept.get(key)

    def put(self, key: str, deltas: dict[str, PackedDelta]) -> None:
        """Keep it, and let go of what was not used for longest. What is larger than all is not."""
        nbytes = _nbytes(deltas)
        with self._lock:
            if nbytes > self._limit or key in self._kept:
                return
            self._kept[key] = deltas
            self.nbytes += nbytes
            while self.nbytes > self._limit:
                self.nbytes -= _nbytes(self._kept.popitem(last=False)[1])

    def keys(self) -> list[str]:
        """What is kept, least recently used first."""
        with self._lock:
            return list(self._kept)


def _nbytes(deltas: Mapping[str, PackedDelta]) -> int:
    return sum(delta.data.nbytes for delta in deltas.values())


class AdapterPacker:
    """Packs adapters for one patched model, and brings them to its device.

    Args:
        patch_map: of the model.
        backend: whose layout.
        coding: how values are stored.
        device: of the model.
        host_bytes: of the tier of packed adapters on the host; used with a device only.
    """

    def __init__(
        self, patch_map: PatchMap, backend: Backend, coding: Coding, device: torch.device,
        host_bytes: int,
    ) -> None:  # fmt: skip
        self._patch_map = patch_map
        self._backend = backend
        self._coding = coding
        self._device = device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self.tier = HostTier(host_bytes if backend == "triton" else 0)

    def bring(self, key: str, decoded: Callable[[], DeltaSet]) -> Packed:
        """An adapter on the device, from the host's tier where it is kept.

        Args:
            key: digest of what it says.
            decoded: reads and decodes it.

        Raises:
            ValueError: it is for another model.
            PackError: a position is out of range.
            DeviceFull: the device has no room.
        """
        if self._backend != "triton":
            return Packed(self.pack(decoded()))
        host = self.tier.get(key)
        if host is None:
            host = self._in_one_buffer(self.pack(decoded()))
            self.tier.put(key, host)
        try:
            return self._placed(host)
        except torch.OutOfMemoryError as cause:
            raise DeviceFull(key, cause) from cause

    def pack(self, deltas: DeltaSet) -> dict[str, PackedDelta]:
        """In the device's layout, in memory of the host, by patched weight."""
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

    def _in_one_buffer(self, deltas: dict[str, PackedDelta]) -> dict[str, PackedDelta]:
        """The same, as slices of one buffer, pinned where that makes copies asynchronous."""
        total = sum(_aligned(delta.data.nbytes) for delta in deltas.values())
        buffer = torch.empty(total, dtype=torch.uint8, pin_memory=self._stream is not None)
        placed, start = {}, 0
        for name, delta in deltas.items():
            part = buffer[start : start + delta.data.nbytes]
            placed[name] = delta.moved(part.copy_(delta.data))
            start += _aligned(delta.data.nbytes)
        return placed

    def _placed(self, host: dict[str, PackedDelta]) -> Packed:
        """On the device, when this returns."""
        if self._stream is None:
            return self._with_table(host)
        with torch.cuda.stream(self._stream):
            packed = self._with_table(self._copied(host))
            arrived = self._stream.record_event()
        # The thread that waits is the loader's. Memory of its stream goes back to its stream, so
        # what the engine's stream still reads must be noted there; it is freed between two steps.
        arrived.synchronize()
        return packed

    def _copied(self, host: dict[str, PackedDelta]) -> dict[str, PackedDelta]:
        if not host:
            return {}
        first, *_ = host.values()
        whole = first.data.untyped_storage()
        source = torch.empty(0, dtype=torch.uint8).set_(whole)
        target = source.to(self._device, non_blocking=True)
        return {
            name: delta.moved(target[delta.data.storage_offset() :][: delta.data.nbytes])
            for name, delta in host.items()
        }

    def _with_table(self, deltas: dict[str, PackedDelta]) -> Packed:
        found = [deltas.get(name) for name in self._patch_map.weights]
        table = records(found)
        if self._stream is not None:
            table = table.pin_memory()
        return Packed(deltas, table.to(self._device, non_blocking=True), sides_of(deltas.values()))


def _aligned(nbytes: int) -> int:
    return -(-nbytes // _ALIGN) * _ALIGN
