"""Decode steps on a device as captured graphs: one launch for the whole model.

Two sets, without and with deltas, whatever the adapters are: a graph reads the step from memory
that stays where it is, and every step is copied there in one piece. Only which sides of tiles there
are is part of a graph, since each has a kernel of its own. A step is padded to the next number of
rows that has a graph; a row of the padding writes nowhere, and is a sequence without a context.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from gossamer.engine.attention import AttentionStep
from gossamer.engine.batch import Batch
from gossamer.engine.patched import StepDeltas
from gossamer.kernels import NotCapturableError, Program, WorkPlan, program_pool
from gossamer.kernels.backends import Backend

log = logging.getLogger(__name__)

#: Rows of the steps that have graphs. Every one takes a second or so to capture, when it is first
#: needed, and a padded row costs what its attention and its logits do.
ROWS = (1, 2, 4, 8, 12, 16, 24, 32, 40, 48, 64)
#: Pages of a sequence that a graph has room for at first; more are captured anew, twice as many.
_FIRST_PAGES = 256

#: ids, position_ids, step → logits [rows, vocabulary].
Forward = Callable[[Tensor, Tensor, AttentionStep], Tensor]


def padded_rows(rows: int) -> int | None:
    """Rows of the graph that takes a step of so many; None: no graph does."""
    return next((size for size in ROWS if size >= rows), None)


@dataclass(frozen=True, eq=False)
class _Memory:
    """What the graphs for one number of rows read: one buffer on the device, and views of it.

    `host` is its mirror, pinned where there is a device; `arrays` are its views.
    """

    data: Tensor
    host: Tensor
    arrays: dict[str, NDArray[Any]]
    ids: Tensor
    positions: Tensor
    step: AttentionStep
    plan: WorkPlan
    weights: Tensor
    pages: int
    copied: torch.cuda.Event | None

    @property
    def rows(self) -> int:
        """Of the steps that it is for."""
        return len(self.step.slots)


def _memory(
    rows: int, pages: int, members: int, like: AttentionStep, device: torch.device
) -> _Memory:
    plan_words = len(WorkPlan.room(rows, members).data)
    parts: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {
        "ids": (torch.int64, (1, rows)),
        "positions": (torch.int64, (1, rows)),
        "slots": (torch.int64, (rows,)),
        "plan": (torch.int64, (plan_words,)),
        "query_start": (torch.int32, (rows + 1,)),
        "context_len": (torch.int32, (rows,)),
        "page_table": (torch.int32, (rows, pages)),
        "weights": (torch.float32, (rows, members, 1)),
    }
    sizes = {n: int(np.prod(shape)) * t.itemsize for n, (t, shape) in parts.items()}
    total = sum(-(-size // 16) * 16 for size in sizes.values())
    data = torch.zeros(total, dtype=torch.uint8, device=device)
    host = torch.zeros(total, dtype=torch.uint8, pin_memory=device.type == "cuda")
    views, arrays, start = {}, {}, 0
    for name, (dtype, shape) in parts.items():
        end = start + sizes[name]
        views[name] = data[start:end].view(dtype).view(shape)
        arrays[name] = host[start:end].view(dtype).view(shape).numpy()
        start = -(-end // 16) * 16
    step = replace(
        like,
        slots=views["slots"],
        page_table=views["page_table"],
        query_start=views["query_start"],
        context_len=views["context_len"],
    )
    plan = replace(WorkPlan.room(rows, members), data=views["plan"])
    copied = torch.cuda.Event() if device.type == "cuda" else None
    return _Memory(data, host, arrays, views["ids"], views["positions"], step, plan,
                   views["weights"], pages, copied)  # fmt: skip


class DecodeGraphs:
    """The graphs of one model; used by the engine's thread only.

    Args:
        forward: the model.
        deltas: what its patched weights add.
        members: most of a mix.
        backend: of its kernels.
        device: of the model.
    """

    def __init__(
        self, forward: Forward, deltas: StepDeltas, members: int, backend: Backend,
        device: torch.device,
    ) -> None:  # fmt: skip
        self._forward = forward
        self._deltas = deltas
        self._members = members
        self._device = device
        self._pool = program_pool(backend)
        self._memory: dict[int, _Memory] = {}
        self._programs: dict[tuple[int, tuple[int, ...] | None], Program | None] = {}

    def run(self, batch: Batch) -> Tensor | None:
        """Logits of a step in which every sequence has one row, [rows, vocabulary].

        The result is overwritten by the next call. None: no graph takes this step.
        """
        deltas = self._deltas
        rows = padded_rows(batch.rows)
        if rows is None or (deltas.plan is not None and deltas.plan.members > self._members):
            return None
        key = (rows, None if deltas.plan is None else deltas.sides)
        if key in self._programs and self._programs[key] is None:
            return None
        memory = self._hold(rows, batch)
        program = self._programs.get(key)
        if program is None:
            program = self._programs[key] = self._capture(memory)
            if program is None:
                return None
        else:
            program.replay()
        return program.result[: batch.rows]

    def _hold(self, rows: int, batch: Batch) -> _Memory:
        """Copy the step to where the graphs for so many rows read it."""
        memory = self._memory.get(rows)
        pages = batch.page_table.shape[1]
        if memory is None or memory.pages < pages:
            known = _FIRST_PAGES if memory is None else memory.pages
            while known < pages:
                known *= 2
            memory = _memory(rows, known, self._members, batch.step, self._device)
            self._memory[rows] = memory
            # What reads the old memory is captured anew.
            self._programs = {
                key: made for key, made in self._programs.items() if key[0] != rows or made is None
            }
        if memory.copied is not None:
            memory.copied.synchronize()  # the mirror may still be read for the step before
        a, n = memory.arrays, batch.rows
        a["ids"][0, :n], a["ids"][0, n:] = batch.ids, 0
        a["positions"][0, :n], a["positions"][0, n:] = batch.positions, 0
        a["slots"][:n], a["slots"][n:] = batch.slots, -1
        a["query_start"][: n + 1] = batch.query_start
        a["query_start"][n + 1 :] = np.arange(n + 1, rows + 1)
        a["context_len"][:n], a["context_len"][n:] = batch.context_len, 0
        a["page_table"][:n, :pages] = batch.page_table
        plan = self._deltas.plan
        if plan is not None:
            words = plan.padded(rows).data.numpy()
            a["plan"][: len(words)] = words
            weights = cast(Tensor, self._deltas.weights).numpy()
            a["weights"][:] = 0
            a["weights"][:n, : weights.shape[1]] = weights
        memory.data.copy_(memory.host, non_blocking=True)
        if memory.copied is not None:
            memory.copied.record()
        return memory

    def _capture(self, memory: _Memory) -> Program | None:
        deltas = self._deltas
        held = StepDeltas()
        if deltas.plan is not None:
            held = replace(deltas, plan=memory.plan, weights=memory.weights)

        def forward() -> Tensor:
            # Here and not around the capture: without graphs a program calls it again.
            with deltas.replaced(held):
                return self._forward(memory.ids, memory.positions, memory.step)

        try:
            return self._pool.capture(forward)
        except NotCapturableError as error:
            log.warning("steps of %d rows run launch by launch: %s", memory.rows, error)
            return None
