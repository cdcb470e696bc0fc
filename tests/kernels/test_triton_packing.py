"""The packer of the Triton layout: compiled and in numpy, which must write the same bytes."""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gossamer.kernels import Coding, PackedDelta, PackError, Piece, pack, to_dense
from gossamer.kernels.gpu import layout, packing
from tests.kernels.cases import block_piece, dense, element_piece, generator

CODINGS: tuple[Coding, ...] = ("float32", "bfloat16", "float16", "int8")
#: Exponents of float32 that the codings treat differently: of its own subnormals, of float16's and
#: below them, of the normal ones, of what float16 and bfloat16 round to infinity.
MAGNITUDES = (1e-42, 3e-8, 6e-8, 1e-5, 1.0, 300.0, 65510.0, 65530.0, 3.4e38)


def both(
    pieces: Sequence[Piece], shape: tuple[int, int], coding: Coding
) -> tuple[PackedDelta, PackedDelta]:
    """Packed by the compiled loops (when the pieces allow it), and by numpy."""
    first, second = (
        PackedDelta(shape, 4, nnz, data, coding, record)
        for nnz, data, record in (
            packing.pack(pieces, shape, coding, loops) for loops in (True, False)
        )
    )
    return first, second


def same(left: PackedDelta, right: PackedDelta) -> bool:
    return (
        left.nnz == right.nnz and left.record == right.record and torch.equal(left.data, right.data)
    )


@st.composite
def deltas(draw: st.DrawFn) -> tuple[list[Piece], tuple[int, int]]:
    """Pieces one after another, their rows empty, full, or of near or far entries."""
    columns = draw(st.sampled_from([1, 5, 42, 257, 300, 1031, 4096]))
    g = generator(draw(st.integers(0, 2**32 - 1)))
    pieces, offset = [], draw(st.integers(0, 40))
    for projection in range(draw(st.integers(0, 4))):
        rows = draw(st.integers(1, 70))
        kind = draw(st.sampled_from(["element", "element", "uneven", "block", "empty"]))
        if kind == "block":
            side = draw(st.sampled_from([3, 8, 16]))
            piece = block_piece(rows, columns, 0.3, side, g, offset, projection)
        elif kind == "uneven":
            share = torch.tensor([0.0, 0.002, 0.02, 0.3, 1.0])
            mask = torch.rand(rows, columns, generator=g)
            mask = mask < share[torch.randint(5, (rows, 1), generator=g)]
            positions = mask.flatten().nonzero().flatten()
            values = torch.randn(len(positions), generator=g)
            piece = Piece("element", projection, offset, rows, 1, positions, values)
        else:
            density = 0.0 if kind == "empty" else draw(st.sampled_from([0.001, 0.01, 0.2]))
            piece = element_piece(rows, columns, density, g, offset, projection)
        if piece.kind == "element":
            sizes = torch.tensor(MAGNITUDES)
            sizes = sizes[torch.randint(len(sizes), piece.positions.shape, generator=g)]
            bounded = piece.values.clamp(-1, 1).where(sizes > 1e38, piece.values)
            piece = replace(piece, values=bounded * sizes if draw(st.booleans()) else piece.values)
        pieces.append(piece)
        offset += rows + draw(st.sampled_from([0, 0, 7]))
    return pieces, (offset + draw(st.integers(1, 5)), columns)


@settings(max_examples=120, deadline=None)
@given(deltas(), st.sampled_from(CODINGS))
def test_both_packers_write_the_same_bytes(
    drawn: tuple[list[Piece], tuple[int, int]], coding: Coding
) -> None:
    pieces, shape = drawn
    compiled, plain = both(pieces, shape, coding)
    assert same(compiled, plain)


def at_density(shape: tuple[int, int], density: float) -> Piece:
    g = generator(3)
    positions = (torch.rand(shape, generator=g) < density).flatten().nonzero().flatten()
    values = torch.randn(len(positions), generator=g)
    return Piece("element", 0, 0, shape[0], 1, positions, values)


@pytest.mark.parametrize(
    ("coding", "density", "form"),
    [
        ("float32", 0.02, layout.PAIR),
        ("bfloat16", 0.002, layout.WORD),
        ("float16", 0.1, layout.GROUP),
        ("int8", 0.002, layout.SPLIT8),
        ("int8", 0.1, layout.GROUP8),
    ],
)
def test_every_form_says_what_the_pieces_say(coding: Coding, density: float, form: int) -> None:
    shape = (45, 2000)
    piece = at_density(shape, density)
    compiled, plain = both([piece], shape, coding)
    assert same(compiled, plain)
    assert compiled.record[layout.FORM] == form
    exact, got = dense([piece], shape), to_dense(compiled).double()
    largest = exact.abs().amax(dim=1, keepdim=True)
    relative = {"float32": 0.0, "float16": 2.0**-11, "bfloat16": 2.0**-8}
    allowed = largest * 0.51 / 127 if coding == "int8" else relative[coding] * exact.abs()
    assert bool(((got - exact).abs() <= allowed).all())
    assert not bool(((got.roll(1, 1) - exact).abs() <= allowed).all())
    # The comparison of bytes sees a single wrong value, and a single wrong column.
    for position, value in ((0, 1.5), (1, 1.0)):
        positions, values = piece.positions.clone(), piece.values.clone()
        positions[-1] -= position * int(positions[-1] - positions[-2] > 1)
        values[-1] *= value
        other = replace(piece, positions=positions, values=values)
        changed = position == 0 or int(piece.positions[-1] - piece.positions[-2]) > 1
        assert same(pack([other], shape, 4, "triton", coding), plain) != changed


@pytest.mark.parametrize("coding", ["bfloat16", "float16"])
def test_values_are_rounded_as_torch_rounds_them(coding: Coding) -> None:
    # Around every power of two: ties to either side, and what lies next to them.
    steps = torch.tensor([0, 1, 0xFFF, 0x1000, 0x1001, 0x3000, 0x7FFF, 0x8000, 0x8001, 0x18000])
    bits = (torch.arange(0, 255)[:, None] << 23) + steps
    values = torch.cat((bits.flatten(), bits.flatten() - (1 << 31)))
    values = values.to(torch.int32).view(torch.float32)
    piece = Piece("element", 0, 0, 1, 1, torch.arange(len(values)), values)
    compiled, plain = both([piece], (1, len(values)), coding)
    assert same(compiled, plain)
    dtype = torch.bfloat16 if coding == "bfloat16" else torch.float16
    wanted = values.to(dtype).float()
    assert torch.equal(to_dense(compiled)[0], wanted)
    assert not torch.equal(to_dense(compiled)[0], values)


@pytest.mark.parametrize("coding", CODINGS)
def test_pieces_that_overlap_or_are_out_of_order_are_added_up(coding: Coding) -> None:
    g = generator(4)
    first, second = (element_piece(20, 300, 0.1, g, offset) for offset in (0, 12))
    for pieces in ([first, second], [second, first], [replace(second, row_offset=20), first]):
        compiled, plain = both(pieces, (40, 300), coding)
        assert same(compiled, plain)
    assert torch.allclose(
        to_dense(pack([first, second], (40, 300), 1, "triton")).double(),
        dense([first, second], (40, 300)),
        atol=1e-6,
    )


@pytest.mark.parametrize("wrong", [-1, 2**40, 20 * 300, None])
def test_both_packers_refuse_the_same_position(wrong: int | None) -> None:
    piece = element_piece(20, 300, 0.1, generator(5))
    at = len(piece.positions) // 2
    positions = piece.positions.clone()
    positions[at] = positions[at - 1] if wrong is None else wrong
    pieces = [replace(piece, projection=0), replace(piece, row_offset=20, positions=positions)]
    refusals = []
    for loops in (True, False):
        with pytest.raises(PackError) as refused:
            packing.pack(pieces, (40, 300), "bfloat16", loops)
        refusals.append((refused.value.piece, refused.value.position, refused.value.reason))
    assert refusals[0] == refusals[1]
    assert refusals[0][:2] == (1, at)


def test_what_lies_scattered_in_memory_is_packed_alike() -> None:
    piece = element_piece(30, 200, 0.2, generator(6))
    doubled = torch.stack((piece.positions, piece.positions), dim=1)[:, 0]
    spread = torch.stack((piece.values, piece.values), dim=1)[:, 0]
    assert not doubled.is_contiguous()
    assert same(
        pack([replace(piece, positions=doubled, values=spread)], (30, 200), 1, "triton", "int8"),
        pack([piece], (30, 200), 1, "triton", "int8"),
    )


def test_the_compiled_loops_are_used_and_leave_the_interpreter_to_others() -> None:
    shape = (2000, 4096)
    piece = at_density(shape, 0.3)
    pack([piece], shape, 1, "triton", "int8")  # compiled, or read from the disk cache
    done = threading.Event()

    def load() -> None:
        pack([piece], shape, 1, "triton", "int8")
        done.set()

    thread = threading.Thread(target=load)
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1000.0)  # whoever holds the lock keeps it until he lets go
    try:
        thread.start()
        turns = 0
        while not done.wait(0.0005):
            turns += 1
    finally:
        sys.setswitchinterval(interval)
        thread.join()
    # A packer that kept the lock would give it away between its calls only, a few times at most.
    assert turns >= 5


def test_packing_needs_no_numba() -> None:
    script = """
import sys
sys.modules["numba"] = None
import torch
import gossamer.kernels as k
piece = k.Piece("element", 0, 0, 4, 1, torch.tensor([0, 5]), torch.ones(2))
packed = k.pack([piece], (4, 10), 1, "triton", "bfloat16")
assert "gossamer.kernels.gpu.packing_loops" not in sys.modules
print(k.to_dense(packed)[0].tolist())
"""
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    expected = np.zeros(10)
    expected[[0, 5]] = 1
    assert run.stdout.strip() == str(expected.tolist()), run.stderr
