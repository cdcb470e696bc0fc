"""Steps of few rows as programs: one launch for all layers, without Python between the kernels.

Twice per number of rows, with and without deltas, and whatever the adapters are: a program reads
the step from memory that stays where it is, and every step is copied there first.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from gossamer.engine.attention import AttentionStep
from gossamer.engine.patched import PatchedLinear, StepDeltas
from gossamer.engine.short_modules import LayerStack
from gossamer.kernels import (
    BoundDeltas,
    NotCapturableError,
    Program,
    WorkPlan,
    program_pool,
)
from gossamer.kernels.backends import Backend

#: With more rows the products are the library's, which no program can hold.
MOST_ROWS = 24
_FIRST_WIDTH = 64


class _Memory:
    """What programs of up to `MOST_ROWS` rows read: the step's rows and where they lie.

    Tensors for the kernels, and the same memory as arrays, which are cheaper to write to.
    """

    def __init__(self, x: Tensor, angle: Tensor, width: int) -> None:
        self.width = width
        self.x = torch.zeros(MOST_ROWS, x.shape[1])
        self.cos, self.sin = torch.zeros(2, 1, MOST_ROWS, angle.shape[-1]).unbind()
        self.slots = torch.zeros(MOST_ROWS, dtype=torch.int64)
        self.page_table = torch.zeros(MOST_ROWS, width, dtype=torch.int32)
        self.query_start = torch.zeros(MOST_ROWS + 1, dtype=torch.int32)
        self.context_len = torch.zeros(MOST_ROWS, dtype=torch.int32)
        names = ("x", "cos", "sin", "slots", "page_table", "query_start", "context_len")
        self._arrays = {name: getattr(self, name).numpy() for name in names}

    def hold(self, x: Tensor, angles: tuple[Tensor, Tensor], step: AttentionStep) -> None:
        """Copy a step here. Behind its sequences there are empty ones."""
        a, rows, sequences = self._arrays, len(x), len(step.context_len)
        a["x"][:rows] = x.numpy()
        a["cos"][0, :rows], a["sin"][0, :rows] = angles[0].numpy(), angles[1].numpy()
        a["slots"][:rows] = step.slots.numpy()
        a["page_table"][:sequences, : step.page_table.shape[1]] = step.page_table.numpy()
        a["query_start"][: sequences + 1] = step.query_start.numpy()
        a["query_start"][sequences + 1 :] = rows
        a["context_len"][:sequences] = step.context_len.numpy()
        a["context_len"][sequences:] = 0

    def step(self, rows: int, like: AttentionStep) -> AttentionStep:
        """This memory as a step of so many rows, in the KV pages of another."""
        return AttentionStep(
            kv=like.kv,
            slots=self.slots[:rows],
            page_table=self.page_table,
            query_start=self.query_start,
            context_len=self.context_len,
            backend=like.backend,
        )


class _DeltaMemory:
    """What programs with deltas read besides, by number of rows: plan, weights, bound deltas."""

    def __init__(self, products: Mapping[str, PatchedLinear], members: int) -> None:
        self._members = members
        self._rooms: dict[int, tuple[WorkPlan, Tensor]] = {}
        self._bound = {
            name: BoundDeltas.room(product.shape, product.projections, MOST_ROWS * members)
            for name, product in products.items()
        }
        self._version = -1

    def hold(self, deltas: StepDeltas) -> StepDeltas | None:
        """Copy a step's deltas here; returns this memory as such. None: there is no room."""
        if deltas.plan is None or deltas.weights is None:
            return StepDeltas()
        if deltas.plan.members > self._members:
            return None
        rows = deltas.plan.rows
        if rows not in self._rooms:
            weights = torch.zeros(rows, self._members, 1)
            self._rooms[rows] = (WorkPlan.room(rows, self._members), weights)
        plan, weights = self._rooms[rows]
        plan.hold(deltas.plan)
        weights.zero_()
        weights[:, : deltas.weights.shape[1]] = deltas.weights
        if deltas.version != self._version:
            for name, bound in self._bound.items():
                bound.hold(deltas.bound.get(name))
            self._version = deltas.version
        return StepDeltas(plan, weights, self._bound)


class StackReplays:
    """The programs of one stack; runs on the engine's thread only."""

    def __init__(
        self,
        deltas: StepDeltas,
        products: Mapping[str, PatchedLinear],
        members: int,
        backend: Backend,
    ) -> None:
        self._deltas = deltas
        self._delta_memory = _DeltaMemory(products, members)
        self._pool = program_pool(backend)
        self._memory: _Memory | None = None
        self._programs: dict[tuple[int, bool], Program | None] = {}

    def run(
        self, stack: LayerStack, x: Tensor, angles: tuple[Tensor, Tensor], step: AttentionStep
    ) -> Tensor | None:
        """x [rows, hidden] → the same shape, from a program, which is captured if need be.

        None: the step has more rows, or more members, than a program holds, or its products are
        the library's.
        """
        rows = len(x)
        key = (rows, self._deltas.plan is not None)
        if rows > MOST_ROWS or (key in self._programs and self._programs[key] is None):
            return None
        held = self._delta_memory.hold(self._deltas)
        if held is None:
            return None
        memory = self._room(x, angles[0], step.page_table.shape[1])
        memory.hold(x, angles, step)
        program = self._programs.get(key)
        if program is None:
            program = self._programs[key] = self._capture(stack, rows, memory, step, held)
            if program is None:
                return None
        else:
            program.replay()
        return memory.x[:rows] + program.result

    def _room(self, x: Tensor, angle: Tensor, width: int) -> _Memory:
        """Memory for page tables of this width; what read the old memory is captured anew."""
        if self._memory is None or self._memory.width < width:
            known = _FIRST_WIDTH if self._memory is None else self._memory.width
            while known < width:
                known *= 2
            self._memory = _Memory(x, angle, known)
            self._programs = {key: None for key, made in self._programs.items() if made is None}
        return self._memory

    def _capture(
        self, stack: LayerStack, rows: int, memory: _Memory, step: AttentionStep, held: StepDeltas
    ) -> Program | None:
        x, angles = memory.x[:rows], (memory.cos[:, :rows], memory.sin[:, :rows])
        still = memory.step(rows, step)
        with self._deltas.replaced(held):
            try:
                return self._pool.capture(lambda: stack.rows(x, angles, still))
            except NotCapturableError:
                return None
