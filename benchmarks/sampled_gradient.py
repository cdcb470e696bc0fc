"""Where a sampled product for the values' gradient stops being faster than a dense one.

The constant `gossamer.training.sparse.SAMPLED_BELOW` comes from this sweep;
docs/decisions/sampled-gradient.md holds its table. Both ways alternate in one process.
"""

from __future__ import annotations

import argparse
import statistics
import time

import torch

from benchmarks.common import markdown
from gossamer.store.format import seeded_positions
from gossamer.training.sparse import Support, values_gradient

SHAPES = ((192, 576), (576, 576), (1536, 576), (2048, 2048))
TOKENS = (320, 1120)
DENSITIES = (0.001, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2)


def ratio(shape: tuple[int, int], tokens: int, density: float, rounds: int) -> tuple[float, float]:
    """Median milliseconds of (sampled, dense), in the calling thread's CPU time."""
    positions = seeded_positions(
        0, "sweep", shape[0] * shape[1], round(density * shape[0] * shape[1])
    )
    support = Support(shape, torch.from_numpy(positions))
    g, x = torch.randn(tokens, shape[0]), torch.randn(tokens, shape[1])
    taken: dict[bool, list[float]] = {True: [], False: []}
    for turn in range(rounds + 1):
        for sampled in (True, False):
            start = time.thread_time()
            values_gradient(g, x, support, sampled=sampled)
            if turn:  # the first round warms up
                taken[sampled].append(1e3 * (time.thread_time() - start))
    return statistics.median(taken[True]), statistics.median(taken[False])


def main() -> None:
    """Print the table: sampled / dense, below 1 where sampling wins."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args()
    torch.set_num_threads(1)
    lines = []
    for shape in SHAPES:
        for tokens in TOKENS:
            cells = [f"{shape[0]} × {shape[1]}, {tokens} tokens"]
            for density in DENSITIES:
                sampled, dense = ratio(shape, tokens, density, options.rounds)
                cells.append(f"{sampled / dense:.2f}")
            lines.append([*cells, f"{dense:.1f} ms"])
    print(markdown(["sampled / dense", *(f"{d:.1%}" for d in DENSITIES), "dense"], lines))


if __name__ == "__main__":
    main()
