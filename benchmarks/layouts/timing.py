"""How long the candidates' kernels take. Needs a CUDA device."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from triton.testing import do_bench

from benchmarks.layouts.entries import Entries
from benchmarks.layouts.layout import Layout, Packed, error
from gossamer.kernels.tolerances import TOLERANCES

_COPY_BYTES = 1 << 29


class WrongResultError(Exception):
    """A kernel does not compute Δ x."""

    def __init__(self, layout: str, error: float) -> None:
        super().__init__(f"{layout}: deviates by {error:g}")
        self.layout = layout
        self.error = error


@dataclass(frozen=True, slots=True)
class Card:
    """The device, and what it reaches when it copies.

    Attributes:
        name: of the device, with the driver's CUDA version.
        bandwidth: bytes read and written in a second by a copy of 512 MiB.
    """

    name: str
    bandwidth: float

    @classmethod
    def here(cls) -> Card | None:
        """The first CUDA device; None if there is none."""
        if not torch.cuda.is_available():
            return None
        source = torch.empty(_COPY_BYTES, dtype=torch.uint8, device="cuda")
        target = torch.empty_like(source)
        milliseconds = do_bench(lambda: target.copy_(source), return_mode="median")
        name = f"{torch.cuda.get_device_name()}, CUDA {torch.version.cuda}"
        return cls(name, 2 * _COPY_BYTES / milliseconds * 1e3)


def microseconds(layout: Layout, packed: Packed, entries: Entries, width: int) -> float:
    """Median time of one launch with cold caches.

    `do_bench` writes over the second-level cache before every launch, as the base's weights do in a
    decode step. The launch itself is part of the time: below some 10 µs it is most of it.

    Raises:
        WrongResultError: the result is not Δ x.
    """
    device = torch.device("cuda")
    arrays = packed.on(device)
    x = torch.randn(packed.columns, width, device=device).to(torch.bfloat16)
    off = error(layout, packed, entries, x)
    if off > TOLERANCES[torch.float32]:
        raise WrongResultError(layout.name, off)
    y = torch.empty(packed.rows, width, device=device)
    kernel = layout.variant(width)
    arguments = (y, x, *arrays.values(), packed.rows, packed.columns, *packed.scalars)

    def launch() -> None:
        kernel.kernel[(len(packed.steps),)](*arguments, **kernel.constants, **kernel.options)

    return float(do_bench(launch, return_mode="median")) * 1e3
