"""The work plan of a step: which rows go through which deltas together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from gossamer.kernels.errors import ShapeError

#: Rows that a kernel takes at once: 16 accumulators of 16 lanes, with their operands, are what
#: AVX-512's 32 registers hold. A longer run of rows finds the deltas in the cache.
CHUNK_ROWS = 16

#: Words of a plan's tensor in front of the chunks.
HEADER_WORDS = 4

#: Rows of one member set from which on a device may multiply with a dense Δ (see `gpu.dense`).
LARGE_ROWS = 65


@dataclass(frozen=True, slots=True)
class LargeSet:
    """A member set that many rows have: `order`[first, first + count), and its slots."""

    first: int
    count: int
    slots: tuple[int, ...]


@dataclass(frozen=True, eq=False, slots=True)
class WorkPlan:
    """A step's rows, sorted by member set and cut into chunks. Shared by all weights of the step.

    A *member set* is the ordered tuple of slots that a row runs with. Rows with equal sets share
    one reading of each member, whatever their weights are. Rows without members are in no chunk.

    Attributes:
        rows: token rows of the step, T.
        members: largest number of members of a row; `weights` must be at least that wide.
        slots: one more than the highest slot in use.
        data: int64: number of chunks, where `order`, `sets` and `chunks` begin; then `touched`,
            `chunks`, `order` and `sets`, one behind the other. One tensor, so one copy to a device,
            that a captured program finds where it was.
        large: the member sets of at least `LARGE_ROWS` rows.
        rest: the plan without the chunks of those; None where there are none.
        order_at: where `order` begins, so that nobody asks a device.
    """

    rows: int
    members: int
    slots: int
    data: Tensor
    large: tuple[LargeSet, ...] = ()
    rest: WorkPlan | None = None
    order_at: int = 0

    @property
    def chunks(self) -> Tensor:
        """int64 [chunks, 4]: first index into `order`, number of rows, first index into `sets`,
        number of members."""
        return self.data[int(self.data[3]) : int(self.data[1])].view(-1, 4)

    @property
    def order(self) -> Tensor:
        """int64 [n]: the rows that have members, chunk by chunk."""
        return self.data[int(self.data[1]) : int(self.data[2])]

    @property
    def sets(self) -> Tensor:
        """int64: the slots of each distinct set, one set behind the other."""
        return self.data[int(self.data[2]) :]

    @property
    def touched(self) -> Tensor:
        """int64 [rows]: 1 for the rows that have members, else 0."""
        return self.data[HEADER_WORDS : HEADER_WORDS + self.rows]

    @property
    def is_empty(self) -> bool:
        """Whether no row has a member, so that `apply` has nothing to do."""
        return self.slots == 0

    @property
    def nbytes(self) -> int:
        """Bytes of the plan's tensor."""
        return self.data.nbytes

    @classmethod
    def room(cls, rows: int, members: int, device: torch.device | str = "cpu") -> WorkPlan:
        """A plan of which only the memory matters: for any plan of so many rows and members."""
        words = HEADER_WORDS + rows + 4 * rows + rows + rows * members
        data = torch.zeros(words, dtype=torch.int64, device=device)
        return cls(rows, members, rows * members, data)

    def padded(self, rows: int) -> WorkPlan:
        """The same plan with rows behind it that have no members; on the host."""
        more = rows - self.rows
        if not more:
            return self
        header = self.data[:HEADER_WORDS].clone()
        header[1:] += more
        nobody = torch.zeros(more, dtype=torch.int64)
        chunks = HEADER_WORDS + self.rows
        parts = (header, self.data[HEADER_WORDS:chunks], nobody, self.data[chunks:])
        return replace(self, rows=rows, data=torch.cat(parts))

    def to(self, device: torch.device | str) -> WorkPlan:
        """The same plan for a device's kernels; the copy is queued there, not waited for."""
        rest = None if self.rest is None else self.rest.to(device)
        return replace(self, data=self.data.to(device, non_blocking=True), rest=rest)

    def rows_of(self, found: LargeSet) -> Tensor:
        """The rows of a large set, where `data` is."""
        start = self.order_at + found.first
        return self.data[start : start + found.count]

    def hold(self, plan: WorkPlan) -> None:
        """Semantics: `data` says what the plan says. For a `room` that is large enough.

        Raises:
            ShapeError: it is not.
        """
        if plan.rows != self.rows or plan.members > self.members:
            expected = f"{self.rows} rows with at most {self.members} members"
            raise ShapeError("plan", expected, (plan.rows, plan.members))
        self.data[: len(plan.data)].copy_(plan.data, non_blocking=True)

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
        large: list[LargeSet] = []
        small: list[tuple[int, int, int, int]] = []
        for slots in sorted(groups):
            if min(slots) < 0 or len(set(slots)) < len(slots):
                raise ValueError(f"slots must be distinct and not negative: {slots}")
            members = groups[slots]
            own = [
                (
                    len(order) + start, min(chunk_rows, len(members) - start), len(sets),
                    len(slots),
                )
                for start in range(0, len(members), chunk_rows)
            ]  # fmt: skip
            chunks += own
            if len(members) >= LARGE_ROWS:
                large.append(LargeSet(len(order), len(members), slots))
            else:
                small += own
            order += members
            sets += slots
        width, top = max(map(len, groups), default=0), max(sets, default=-1) + 1
        whole = cls._laid_out(rows, width, top, chunks, order, sets)
        if not large:
            return whole
        rest = cls._laid_out(rows, width, top, small, order, sets)
        return replace(whole, large=tuple(large), rest=rest)

    @classmethod
    def _laid_out(
        cls,
        rows: int,
        members: int,
        slots: int,
        chunks: Sequence[tuple[int, int, int, int]],
        order: Sequence[int],
        sets: Sequence[int],
    ) -> WorkPlan:
        touched = [0] * rows
        for row in order:
            touched[row] = 1
        words = [word for chunk in chunks for word in chunk]
        chunks_at = HEADER_WORDS + rows
        order_at = chunks_at + len(words)
        header = (len(chunks), order_at, order_at + len(order), chunks_at)
        return cls(
            rows=rows,
            members=members,
            slots=slots,
            order_at=order_at,
            data=torch.tensor([*header, *touched, *words, *order, *sets], dtype=torch.int64),
        )
