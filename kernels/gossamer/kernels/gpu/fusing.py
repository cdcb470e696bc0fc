"""Mixes written into weights on a device, and how far that is from the mix."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from gossamer.kernels.errors import ShapeError
from gossamer.kernels.gpu.launch import require
from gossamer.kernels.gpu.scatter import Job, Jobs, room_for
from gossamer.kernels.scatter import Target

#: Of float32 copies at once, where several deltas go into weights of 16 bits.
_SCRATCH_BYTES = 1 << 29


class Fusing:
    """See `gossamer.kernels.scatter.Saved`. Every target has deltas."""

    def __init__(self, targets: Sequence[Target]) -> None:
        self._listed, self._kept = _listed(targets)
        self._jobs = Jobs([job for mine in self._listed for job in mine])

    @property
    def nbytes(self) -> int:
        """Bytes of the saved entries."""
        return self._kept.nbytes

    def write(self) -> None:
        """One delta a weight: one launch for all of them.

        With more, the old entries of all are saved; then the weights go in groups through float32
        copies, where the deltas are added one after the other, and what they touch comes back
        rounded once.
        """
        if all(len(jobs) == 1 for jobs in self._listed):
            self._jobs.run("fuse")
            return
        self._jobs.run("save")
        for group in _groups(self._listed):
            _add_in_float32(group)

    def restore(self) -> None:
        """Every delta saved what was there before the first, so any order will do."""
        self._jobs.run("restore")


def _listed(targets: Sequence[Target]) -> tuple[list[list[Job]], Tensor]:
    """The jobs of each weight, and the room for what they overwrite, one tensor for all."""
    first, coding = targets[0].view, targets[0].deltas[0].coding
    for target in targets:
        require("weight", target.weight, like=first)
        for delta in target.deltas:
            if (delta.coding, delta.data.device) != (coding, first.device):
                expected = f"of coding {coding} on {first.device}"
                raise ShapeError("deltas", expected, (delta.coding, delta.data.device))
    room = [room_for(delta) for target in targets for delta in target.deltas]
    kept = first.new_empty(sum(room))
    factors = torch.cat([target.weights.reshape(-1) for target in targets]).to(first.device)
    widths = [target.weights.shape[1] for target in targets for _ in target.deltas]
    places = zip(factors.split(widths), kept.split(room), strict=True)
    listed = []
    for target in targets:
        own = zip(target.deltas, places, strict=False)
        listed.append([Job(target.view, delta, *place) for delta, place in own])
    return listed, kept


def _groups(listed: Sequence[list[Job]]) -> Iterator[list[list[Job]]]:
    """Weights whose float32 copies fit the scratch together, or one."""
    group: list[list[Job]] = []
    taken = 0
    for jobs in listed:
        nbytes = 4 * jobs[0].matrix.numel()
        if group and taken + nbytes > _SCRATCH_BYTES:
            yield group
            group, taken = [], 0
        group.append(jobs)
        taken += nbytes
    yield group


def _add_in_float32(group: Sequence[list[Job]]) -> None:
    totals = [_float32_copy(jobs[0].matrix) for jobs in group]
    each = list(zip(totals, group, strict=True))
    for i in range(max(map(len, group))):
        there = [(total, jobs[i]) for total, jobs in each if i < len(jobs)]
        Jobs([Job(total, job.delta, job.factors) for total, job in there]).run("add")
    back = [(total, job) for total, jobs in each for job in jobs]
    Jobs([Job(j.matrix, j.delta, j.factors, total=total) for total, j in back]).run("round")


def _float32_copy(matrix: Tensor) -> Tensor:
    total = torch.empty_strided(
        matrix.shape, matrix.stride(), dtype=torch.float32, device=matrix.device
    )
    return total.copy_(matrix)


def rounding(target: Target) -> tuple[float, float]:
    """See `gossamer.kernels.scatter.rounding`; what is exact there is float32 here.

    Takes room for two float32 weights, and waits for the device once.
    """
    change = torch.zeros_like(target.view, dtype=torch.float32)
    (jobs,), _ = _listed([target])
    for job in jobs:
        Jobs([Job(change, job.delta, job.factors)]).run("add")
    norm = torch.linalg.vector_norm(change, dtype=torch.float64)
    exact = change.add_(target.view)
    lost = torch.linalg.vector_norm(exact - exact.to(target.weight.dtype), dtype=torch.float64)
    error, size = torch.stack([lost, norm]).square().tolist()
    return error, size
