"""The candidates' kernels against the dense product: `python -m benchmarks.layouts.checking`.

On a CUDA device, or on any machine in Triton's interpreter (TRITON_INTERPRET=1). Prints as CSV how
far each result is from the dense product, relative to the largest, and how far when the column of
one entry has moved by one before packing, which must be seen.
"""

from __future__ import annotations

import csv
import sys
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import torch
import triton

from benchmarks.layouts.candidates import CANDIDATES, WIDTHS
from benchmarks.layouts.entries import Entries, from_mask
from benchmarks.layouts.layout import error

#: (out, in), density, entries of the longest row. Odd sizes; a row with more than 255 units; tiles
#: of 4096 columns that end early.
SHAPES = (((42, 123), 0.1, 123), ((133, 70), 0.05, 0), ((3, 4133), 0.004, 300), ((2, 5), 0.0, 0))


def small_entries(shape: tuple[int, int], density: float, longest: int) -> Entries:
    """A random mask whose first row is empty and whose second has `longest` entries at its end."""
    generator = np.random.default_rng(0)
    mask = generator.random(shape) < density
    mask[0] = False
    mask[1, shape[1] - longest :] |= longest > 0
    return from_mask(mask, generator)


def with_one_moved(entries: Entries) -> Entries:
    """One column one to the left; the last entry of the last row that has room for it."""
    before = np.append(-1, entries.column[:-1])
    before[entries.starts[:-1][entries.lengths > 0]] = -1
    at = int(np.flatnonzero(entries.column - before > 1)[-1])
    column = entries.column.copy()
    column[at] -= 1
    return replace(entries, column=column)


def deviations(device: torch.device) -> Iterator[tuple[str, str, int, str, float]]:
    """Layout, shape, rows of the step, what was packed, and how far the result is off."""
    # Triton 3.9's interpreter multiplies the bits of bfloat16 in `tl.dot`.
    on_card = device.type == "cuda"
    for shape, density, longest in SHAPES:
        entries = small_entries(shape, density, longest)
        packings = {"entries": entries}
        if len(entries.column):
            packings["one moved"] = with_one_moved(entries)
        for layout in CANDIDATES:
            for width in WIDTHS:
                x = torch.randn(shape[1], width, generator=torch.Generator().manual_seed(1))
                x = x.to(device, torch.bfloat16 if layout.only_bfloat16 or on_card else x.dtype)
                for name, packed in packings.items():
                    off = error(layout, layout.pack(packed), entries, x)
                    yield layout.name, f"{shape[0]}x{shape[1]}", width, name, off


def main() -> None:
    """Print the deviations."""
    if not torch.cuda.is_available() and not triton.knobs.runtime.interpret:
        sys.exit("no CUDA device; set TRITON_INTERPRET=1 to run in Triton's interpreter")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    writer = csv.writer(sys.stdout, lineterminator="\n")
    writer.writerow(["layout", "shape", "rows", "packed", "deviation"])
    writer.writerows(deviations(device))


if __name__ == "__main__":
    main()
