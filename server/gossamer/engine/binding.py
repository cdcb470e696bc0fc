"""Which slot of the kernels' tables each adapter of a step has.

On the CPU the tables are made anew when the set of adapters changes. On a device they are memory
that captured graphs read, so they stay, and an adapter is written into a slot when it joins.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from gossamer.base.patch_map import PatchedWeight
from gossamer.engine.residency import Resident
from gossamer.kernels import Backend, BoundDeltas, Coding, PackedDelta, bind
from gossamer.kernels.delta import records


@dataclass(frozen=True)
class Bound:
    """The adapters of a step, as the kernels find them.

    Attributes:
        slots: adapter key → slot.
        deltas: by patched weight; those that no adapter changes may be absent.
        version: another number whenever `deltas` is another.
        sides: of the tiles among them.
    """

    slots: Mapping[str, int]
    deltas: dict[str, BoundDeltas]
    version: int = 0
    sides: tuple[int, ...] = ()


class Binding(Protocol):
    """Gives slots to the adapters of a step."""

    def bind(self, keys: Sequence[str], residents: Mapping[str, Resident]) -> Bound:
        """Slots for these adapters and no others. `keys` is sorted, and not empty."""

    def forget(self) -> None:
        """No step uses any adapter for now: hold none in memory."""


class HostBinding:
    """Tables that are made anew."""

    def __init__(self, weights: Mapping[str, PatchedWeight], backend: Backend) -> None:
        self._weights = weights
        self._backend = backend
        self._active: tuple[str, ...] = ()
        self._bound = Bound({}, {})

    def bind(self, keys: Sequence[str], residents: Mapping[str, Resident]) -> Bound:
        """See `Binding`."""
        if tuple(keys) != self._active:
            adapters = [residents[key].deltas for key in keys]
            changed = {name for deltas in adapters for name in deltas}
            bound = {
                name: bind(
                    [deltas.get(name) for deltas in adapters],
                    self._weights[name].shape,
                    self._backend,
                )
                for name in changed
            }
            slots = {key: i for i, key in enumerate(keys)}
            self._bound = Bound(slots, bound, self._bound.version + 1)
            self._active = tuple(keys)
        return self._bound

    def forget(self) -> None:
        """See `Binding`."""
        self._active, self._bound = (), Bound({}, {}, self._bound.version)


class DeviceBinding:
    """One table for all patched weights, [slots, weights, words], that stays where it is.

    Args:
        weights: of the patched model, in the order of an adapter's `Resident.table`.
        coding: of all adapters.
        slots: most adapters of a step.
        device: of the model.
    """

    def __init__(
        self, weights: Mapping[str, PatchedWeight], coding: Coding, slots: int,
        device: torch.device,
    ) -> None:  # fmt: skip
        words = records([None]).shape[1]
        self._table = torch.zeros(slots, len(weights), words, dtype=torch.int64, device=device)
        # By weight, what its slots hold.
        self._held: dict[str, list[PackedDelta | None]] = {name: [None] * slots for name in weights}
        self._deltas = {
            name: BoundDeltas.of_table(
                self._table[:, i], w.shape, len(w.rows), coding, self._held[name]
            )
            for i, (name, w) in enumerate(weights.items())
        }
        self._by_sides: dict[tuple[int, ...], dict[str, BoundDeltas]] = {(): self._deltas}
        self._slots: dict[str, int] = {}
        self._written: dict[int, int] = {}  # slot → address of the table it was written from
        self._free = list(range(slots - 1, -1, -1))

    def bind(self, keys: Sequence[str], residents: Mapping[str, Resident]) -> Bound:
        """See `Binding`."""
        for key in self._slots.keys() - set(keys):
            self._release(key)
        sides: set[int] = set()
        for key in keys:
            table = residents[key].table
            if table is None:
                raise RuntimeError(f"{key} was not packed for a device")
            slot = self._slots.get(key)
            if slot is None or self._written[slot] != table.data_ptr():
                slot = self._free.pop() if slot is None else slot
                self._slots[key] = slot
                self._table[slot].copy_(table, non_blocking=True)
                self._written[slot] = table.data_ptr()
                self._hold(slot, residents[key].deltas)
            sides.update(residents[key].sides)
        found = tuple(sorted(sides))
        return Bound(self._slots, self._with(found), sides=found)

    def forget(self) -> None:
        """See `Binding`."""
        for key in list(self._slots):
            self._release(key)

    def _release(self, key: str) -> None:
        slot = self._slots.pop(key)
        self._hold(slot, {})
        self._free.append(slot)

    def _hold(self, slot: int, deltas: Mapping[str, PackedDelta]) -> None:
        for name, held in self._held.items():
            held[slot] = deltas.get(name)

    def _with(self, sides: tuple[int, ...]) -> dict[str, BoundDeltas]:
        if sides not in self._by_sides:
            made = {name: bound.with_sides(sides) for name, bound in self._deltas.items()}
            self._by_sides[sides] = made
        return self._by_sides[sides]
