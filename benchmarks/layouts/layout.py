"""What every candidate has: a packer, a kernel, and an account of its bytes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from benchmarks.layouts.entries import Entries
from gossamer.kernels.gpu.variant import Variant
from gossamer.kernels.tolerances import deviation


@dataclass(frozen=True, eq=False, slots=True)
class Packed:
    """One delta in one layout.

    Attributes:
        rows, columns, nnz: of the delta.
        arrays: everything that a kernel reads, by the name of its argument, in their order.
        slots: places for a value, padding included.
        steps: int64 [programs], how often each program of the kernel goes round its inner loop.
        scalars: what else the kernel takes, behind rows and columns.
    """

    rows: int
    columns: int
    nnz: int
    arrays: Mapping[str, NDArray[Any]]
    slots: int
    steps: NDArray[np.int64]
    scalars: Sequence[int] = ()

    @property
    def nbytes(self) -> int:
        """With 16-bit values: everything that must be read at least once."""
        return sum(array.nbytes for array in self.arrays.values())

    @property
    def nbytes8(self) -> int:
        """The same with 8-bit values and a 16-bit scale for each row."""
        return self.nbytes - self.slots + 2 * self.rows

    def on(self, device: torch.device) -> dict[str, Tensor]:
        """The arrays as tensors. 16-bit values stay integers, as the kernels take them."""
        return {name: torch.from_numpy(array).to(device) for name, array in self.arrays.items()}


@dataclass(frozen=True, slots=True)
class Step:
    """One round of a kernel's inner loop.

    Attributes:
        slots: places for an entry that all threads of a program go through.
        products: multiply-adds of one thread, or its instructions on tensor cores. Compilers unroll
            loops; by this number it is seen how often.
    """

    slots: int
    products: int


@dataclass(frozen=True, slots=True)
class Layout:
    """A candidate.

    Every kernel computes y[o, t] = Σ_i Δ[o, i] · x[i, t] in fp32 for one delta and `T` rows of a
    step, and takes (y, x, *arrays, rows, columns, *scalars) and T.

    Attributes:
        name: of the candidate.
        pack: entries to arrays.
        variant: the kernel for T rows with x in bfloat16.
        step: what one round of the inner loop is, for T rows.
        bytes8: bytes with 8-bit values, where `Packed.nbytes8` does not know it.
        only_bfloat16: whether the kernel can read no other x, such as float32.
    """

    name: str
    pack: Callable[[Entries], Packed]
    variant: Callable[[int], Variant]
    step: Callable[[int], Step]
    bytes8: Callable[[Entries], int] | None = None
    only_bfloat16: bool = False


def signature(arrays: Mapping[str, str]) -> dict[str, str]:
    """The types of a kernel's arguments, given those of its arrays."""
    return {"y": "*fp32:16", "x": "*bf16:16", **arrays, "rows": "i32:16", "columns": "i32:16"}


def multiply(layout: Layout, arrays: Mapping[str, Tensor], packed: Packed, x: Tensor) -> Tensor:
    """Δ x for x [columns, T] on the device of the arrays; float32 [rows, T].

    The result is poisoned before the kernel runs, so that a row it leaves out is seen.
    """
    variant = layout.variant(x.shape[1])
    y = torch.full((packed.rows, x.shape[1]), float("nan"), device=x.device)
    variant.kernel[(len(packed.steps),)](
        y, x, *arrays.values(), packed.rows, packed.columns, *packed.scalars,
        **variant.constants, **variant.options,
    )  # fmt: skip
    return y


def error(layout: Layout, packed: Packed, entries: Entries, x: Tensor) -> float:
    """How far a kernel is from the dense product in fp32 on the device of x [columns, T], relative
    to the largest result; see `gossamer.kernels.tolerances`."""
    place = torch.from_numpy(entries.row * entries.columns + entries.column).to(x.device)
    dense = torch.zeros(entries.rows * entries.columns, device=x.device)
    dense[place] = torch.from_numpy(entries.value).to(x.device)
    expected = dense.view(entries.rows, entries.columns) @ x.float()
    return deviation(multiply(layout, packed.on(x.device), packed, x), expected)
