"""How fast adapters are packed for a device: `python -m benchmarks.packing [--csv]`.

Random pieces on the patched weights of Llama-3.1-8B, the clock being the CPU time of one thread
(which a busy machine disturbs less), every check included. `numpy` packs the same pieces without
the compiled loops, as a machine without numba does, and must write the same bytes.
"""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path
from typing import NamedTuple, get_args

import torch

from benchmarks.common import RESULTS, Meter, Provenance, aligned, write_csv
from gossamer.kernels import Coding, Piece, pack
from gossamer.kernels.delta import entries as entries_of
from gossamer.kernels.gpu import packing

#: (rows of the packed projections, columns).
WEIGHTS = {"qkv": ((4096, 1024, 1024), 4096), "gate_up": ((14336, 14336), 4096)}
DENSITIES = (0.001, 0.006, 0.01, 0.1)
TILE = 16
#: Seconds of a round.
SHORTEST = 0.05


class Line(NamedTuple):
    """One measurement; rates in million entries a second of one core, `error` relative to the
    norm of normally distributed values."""

    weight: str
    kind: str
    density: float
    coding: str
    entries: int
    bytes_an_entry: float
    error: float
    rate: float
    numpy: float
    foreign: float


def random_pieces(parts: tuple[int, ...], columns: int, density: float, kind: str) -> list[Piece]:
    """One piece for every packed projection."""
    pieces, offset = [], 0
    side = TILE if kind == "block" else 1
    for projection, rows in enumerate(parts):
        cells = rows * columns // side**2
        positions = torch.randint(cells, (round(cells * density),)).unique()
        shape = (len(positions), side, side) if kind == "block" else (len(positions),)
        values = torch.randn(shape)
        pieces.append(Piece("block" if kind == "block" else "element", projection, offset, rows,
                            side, positions, values))  # fmt: skip
        offset += rows
    return pieces


def seconds(
    pieces: list[Piece], shape: tuple[int, int], coding: Coding, loops: bool = True
) -> float:
    """CPU time of packing once: the mean of as many as take a time that the clock resolves."""
    count, start = 0, time.thread_time()
    while (passed := time.thread_time() - start) < SHORTEST:
        packing.pack(pieces, shape, coding, loops)
        count += 1
    return passed / count


def lost(pieces: list[Piece], shape: tuple[int, int], projections: int, coding: Coding) -> float:
    """‖what was packed − what was given‖ / ‖what was given‖."""
    given = torch.zeros(shape)
    for piece in pieces:
        part = pack([piece], shape, projections, "triton", "float32")
        for _, rows, columns, values in entries_of(part):
            given[rows, columns] = values
    back = torch.zeros(shape)
    for _, rows, columns, values in entries_of(pack(pieces, shape, projections, "triton", coding)):
        back[rows, columns] = values
    return float((back - given).norm() / given.norm())


def measure(weight: str, kind: str, density: float, coding: Coding, rounds: int) -> Line:
    """The median of some rounds, after one to warm up; numpy once."""
    parts, columns = WEIGHTS[weight]
    shape = (sum(parts), columns)
    pieces = random_pieces(parts, columns, density, kind)
    entries, packed, _ = packing.pack(pieces, shape, coding)
    with Meter() as meter:
        ours = statistics.median(seconds(pieces, shape, coding) for _ in range(rounds))
        plain = seconds(pieces, shape, coding, loops=False)
    _, expected, _ = packing.pack(pieces, shape, coding, loops=False)
    assert torch.equal(packed, expected), "the packers write different bytes"
    return Line(weight, kind, density, coding, entries, packed.nbytes / entries,
                lost(pieces, shape, len(parts), coding), entries / ours / 1e6,
                entries / plain / 1e6, meter.foreign)  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--codings", nargs="*", choices=get_args(Coding),
                        default=["bfloat16", "int8"])  # fmt: skip
    parser.add_argument("--csv", type=Path, nargs="?", const=RESULTS / "packing.csv")
    options = parser.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(1)
    cases = [(w, "element", d) for w in WEIGHTS for d in DENSITIES] + [("qkv", "block", 0.1)]
    lines = [measure(*case, c, options.rounds) for case in cases for c in options.codings]
    provenance = Provenance.here().columns()
    print("\n".join(f"{name}: {value}" for name, value in provenance.items()), end="\n\n")
    shown = [[f"{v:.3g}" if isinstance(v, float) else str(v) for v in line] for line in lines]
    print(aligned([*Line._fields], shown))
    if options.csv:
        named = [dict(zip(Line._fields, line, strict=True)) for line in shown]
        write_csv(options.csv, [{**line, **provenance} for line in named])


if __name__ == "__main__":
    main()
