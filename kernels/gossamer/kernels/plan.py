"""The work plan of a step: which rows go through which deltas together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

#: Rows that a kernel takes at once: 16 accumulators of 16 lanes, with their operands, are what
#: AVX-512's 32 registers hold. A longer run of rows finds the deltas in the cache.
CHUNK_ROWS = 16


@dataclass(frozen=True, eq=False, slots=True)
class WorkPlan:
    """A step's rows, sorted by member set and cut into chunks. Shared by all weights of the step.

    A *member set* is the ordered tuple of slots that a row runs with. Rows with equal sets share
    one reading of each member, whatever their weights are. Rows without members are in no chunk.

    Attributes:
        rows: token rows of the step, T.
        members: largest number of members of a row; `weights` must be at least that wide.
        slots: one more than the highest slot in use.
        order: int64 [n], the rows that have members, chunk by chunk.
        chunks: int64 [chunks, 4]: first index into `order`, number of rows, first index into
            `sets`, number of members.
        sets: int64, the slots of each distinct set, one set behind the other.
    """

    rows: int
    members: int
    slots: int
    order: Tensor
    chunks: Tensor
    sets: Tensor

    @property
    def is_empty(self) -> bool:
        """Whether no row has a member, so that `apply` has nothing to do."""
        return self.chunks.shape[0] == 0

    @property
    def nbytes(self) -> int:
        """Bytes of the plan's tensors."""
        return self.order.nbytes + self.chunks.nbytes + self.sets.nbytes

    @classmethod
    def build(
        cls,
        row_slots: Sequence[tuple[int, ...]] = (),
        *,
        runs: Sequence[tuple[int, tuple[int, ...]]] | None = None,
        chunk_rows: int = CHUNK_ROWS,
    ) -> WorkPlan:
        """Semantics: rows grouped by equal slots, each group cut into chunks of `chunk_rows`.

        Takes about 1 µs a row or run and 20 µs for the tensors; nothing is read from a device.

        Args:
            row_slots: per row of the step its slots in the order of summation; () is a base row.
            runs: instead of `row_slots`: (count, slots) for consecutive rows with equal slots.
            chunk_rows: largest chunk, at most `CHUNK_ROWS`.

        Raises:
            ValueError: both forms are given, a count or a slot is negative, a slot occurs twice in
                a row, or `chunk_rows` is out of range.
        """
        if not 1 <= chunk_rows <= CHUNK_ROWS:
            raise ValueError(f"chunk_rows must be in [1, {CHUNK_ROWS}], is {chunk_rows}")
        if runs is None:
            runs = [(1, slots) for slots in row_slots]
        elif row_slots:
            raise ValueError("give row_slots or runs, not both")
        groups: dict[tuple[int, ...], list[int]] = {}
        row = 0
        for count, slots in runs:
            if count < 0:
                raise ValueError(f"a run of {count} rows")
            if slots and count:
                groups.setdefault(slots, []).extend(range(row, row + count))
            row += count
        return cls._from_groups(row, groups, chunk_rows)

    @classmethod
    def _from_groups(
        cls, rows: int, groups: dict[tuple[int, ...], list[int]], chunk_rows: int
    ) -> WorkPlan:
        order: list[int] = []
        chunks: list[tuple[int, int, int, int]] = []
        sets: list[int] = []
        for slots in sorted(groups):
            if min(slots) < 0 or len(set(slots)) < len(slots):
                raise ValueError(f"slots must be distinct and not negative: {slots}")
            members = groups[slots]
            for start in range(0, len(members), chunk_rows):
                count = min(chunk_rows, len(members) - start)
                chunks.append((len(order) + start, count, len(sets), len(slots)))
            order += members
            sets += slots
        return cls(
            rows=rows,
            members=max(map(len, groups), default=0),
            slots=max(sets, default=-1) + 1,
            order=torch.tensor(order, dtype=torch.int64),
            chunks=torch.tensor(chunks, dtype=torch.int64).view(-1, 4),
            sets=torch.tensor(sets, dtype=torch.int64),
        )
