"""The candidates of the layout comparison compute Δ x, and their bytes are counted right."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import pytest
import torch

from gossamer.kernels import Piece, pack
from gossamer.kernels.delta import Coding
from gossamer.kernels.tolerances import TOLERANCES

ROOT = Path(__file__).parents[2]


def layouts(module: str) -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(ROOT)
        return importlib.import_module(f"benchmarks.layouts.{module}")


@pytest.mark.gate
def test_interpret_candidates_compute_the_product_and_a_moved_column_is_seen() -> None:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    found = list(layouts("checking").deviations(device))
    names = {layout.name for layout in layouts("candidates").CANDIDATES}
    for packed in ("entries", "one moved"):
        assert {name for name, _, _, what, _ in found if what == packed} == names
    bound = TOLERANCES[torch.float32]
    for *where, packed, deviation in found:
        assert (deviation <= bound) == (packed == "entries"), (where, packed, deviation)


def test_bytes_are_those_of_the_arrays_and_of_the_packer() -> None:
    entries = layouts("entries").random_entries((640, 1024), 0.02, "uneven", 0)
    positions = torch.from_numpy(entries.row * 1024 + entries.column)
    piece = Piece("element", 0, 0, 640, 1, positions, torch.from_numpy(entries.value))
    csr = layouts("csr")
    expected: list[tuple[Coding, int]] = [
        ("bfloat16", min(csr.pack(entries, 32).nbytes, csr.pack_groups(entries).nbytes)),
        ("int8", min(csr.pack(entries, 32).nbytes8, csr.group_bytes8(entries))),
    ]
    for coding, ours in expected:
        theirs = pack([piece], (640, 1024), backend="triton", coding=coding).data.nbytes
        # Its parts begin at multiples of 128, the first behind 128 bytes of nothing.
        assert ours <= theirs <= ours + 6 * 128


@pytest.mark.parametrize(("mask", "ratio"), [("uniform", 1.3), ("uneven", 10.0)])
def test_masks_have_the_density_and_the_evenness_they_say(mask: str, ratio: float) -> None:
    entries = layouts("entries").random_entries((4000, 4096), 0.01, mask, 0)
    lengths = torch.from_numpy(entries.lengths).double()
    assert entries.column.size == pytest.approx(4000 * 4096 * 0.01, rel=0.03)
    densest = lengths.sort().values[-40:].mean() / lengths.median()
    assert densest == pytest.approx(ratio * 1.25, rel=0.25)


def test_padding_is_counted() -> None:
    random_entries = layouts("entries").random_entries
    sell, positions = layouts("sell").sell(256), layouts("positions").POSITIONS
    entries = random_entries((512, 4096), 0.001, "uneven", 0)
    packed = sell.pack(entries)
    assert packed.slots > packed.nnz
    assert packed.nbytes == 4 * packed.slots + 4 * (512 // 32 + 1) + 2 * 512
    assert positions.pack(entries).nbytes == 4 * packed.nnz + 4 * (512 // 16 + 1)
