"""An adapter written into the weights and taken out again, and how long it takes to pack one."""

from __future__ import annotations

import torch

from benchmarks.kernels.bench import MODEL, Bench, Line
from benchmarks.kernels.deltas import packed, random_delta, random_pieces
from benchmarks.roofline.models import Weight
from gossamer.kernels import Piece, Saved, Target, fuse_into, restore


def fusing(bench: Bench) -> list[Line]:
    """Writing one adapter into the weights and taking it out again."""
    cases = (("element", 0.01), ("element", 0.1), ("block", 0.1))
    return [line for kind, density in cases for line in fuse_and_restore(bench, kind, density)]


def fuse_and_restore(bench: Bench, kind: str, density: float) -> list[Line]:
    """The two lines of one adapter."""
    deltas = [[random_delta(kind, w, density) for w in MODEL.weights] for _ in range(MODEL.layers)]
    one = torch.ones(1, 1)
    targets = [
        Target(weight, [delta], one, transposed=True)
        for layer, row in zip(bench.base, deltas, strict=True)
        for weight, delta in zip(layer, row, strict=True)
    ]
    saved: list[Saved] = []

    def fuse() -> None:
        saved[:] = [fuse_into(targets)]

    def undo() -> None:
        restore(saved[0])

    times, foreign = bench.alternate(fuse, undo)
    entries = sum(d.nnz for row in deltas for d in row)
    nbytes = sum(d.data.nbytes for row in deltas for d in row) + 12 * entries
    predicted = bench.predicted(nbytes)
    return [
        Line(what, kind, density, 0, entries, nbytes / 1e6, predicted, milliseconds, 0, 0, foreign)
        for what, milliseconds in zip(("fuse", "restore"), times, strict=True)
    ]


def packing(bench: Bench) -> list[Line]:
    """Packing one adapter: all its pieces on every weight of one layer, times the layers."""
    cases = (("element", 0.0005), ("element", 0.01), ("element", 0.1), ("block", 0.1))
    return [pack_layers(bench, kind, density) for kind, density in cases]


def pack_layers(bench: Bench, kind: str, density: float) -> Line:
    """The line of one adapter."""
    layer: list[tuple[list[Piece], Weight]] = [
        (random_pieces(kind, w, density), w) for w in MODEL.weights
    ]
    made = [packed(pieces, w) for pieces, w in layer]

    def run() -> None:
        for _ in range(MODEL.layers):
            for pieces, w in layer:
                packed(pieces, w)

    (milliseconds,), foreign = bench.alternate(run)
    entries = MODEL.layers * sum(p.nnz for p in made)
    nbytes = MODEL.layers * sum(p.data.nbytes for p in made)
    return Line("pack", kind, density, 0, entries, nbytes / 1e6,
                bench.predicted(nbytes + 12 * entries), milliseconds, 0, 0, foreign)  # fmt: skip
