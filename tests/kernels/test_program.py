"""Programs: what they compute again, what they refuse, and whose memory they use."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

from gossamer.kernels import (
    BackendUnavailableError,
    BoundDeltas,
    IndexRangeError,
    NotCapturableError,
    WorkPlan,
    apply,
    bind,
    fused_add_rms_norm,
    linear,
    new_kv_pages,
    pack,
    paged_attention,
    program_pool,
    rms_norm,
    rotate_and_write,
    silu_and_mul,
)
from tests.kernels.cases import block_piece, element_piece, generator

ROWS, HIDDEN, DIM, HEADS, KV_HEADS, PAGE = 5, 64, 16, 4, 2, 16
QKV = (HEADS + 2 * KV_HEADS) * DIM


@pytest.fixture(params=[1, 2, 5])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


class Layer:
    """A layer of five rows with every kernel in it, and what it reads."""

    def __init__(self) -> None:
        g = generator(0)
        self.x = torch.randn(ROWS, HIDDEN, generator=g)
        self.norm = torch.rand(HIDDEN, generator=g)
        self.qkv = torch.randn(HIDDEN, QKV, generator=g) / 8
        self.bias = torch.randn(QKV, generator=g)
        self.o = torch.randn(HEADS * DIM, HIDDEN, generator=g) / 8
        self.up = torch.randn(HIDDEN, 2 * HIDDEN, generator=g) / 8
        self.cos, self.sin = torch.randn(2, ROWS, DIM, generator=g).unbind()
        self.pages = [page.zero_() for page in new_kv_pages(ROWS, PAGE, KV_HEADS, DIM)]
        self.slots = torch.arange(ROWS) * PAGE
        self.table = torch.arange(ROWS, dtype=torch.int32)[:, None]
        self.starts = torch.arange(ROWS + 1, dtype=torch.int32)
        self.lengths = torch.ones(ROWS, dtype=torch.int32)
        pieces = [
            element_piece(QKV, HIDDEN, 0.1, generator(1)),
            block_piece(QKV, HIDDEN, 0.1, 8, generator(2)),
            element_piece(QKV, HIDDEN, 0.1, generator(3)),
        ]
        self.deltas = [pack([piece], (QKV, HIDDEN)) for piece in pieces]
        self.plan = WorkPlan.room(ROWS, members=2)
        self.bound = BoundDeltas.room((QKV, HIDDEN), projections=1, slots=2 * ROWS)
        self.weights = torch.zeros(ROWS, 2, 1)
        self.give([(0,), (), (1, 0), (0,), (1,)], [0, 1])

    def give(self, row_slots: list[tuple[int, ...]], adapters: list[int]) -> None:
        """Other adapters for the rows, in the same memory."""
        self.plan.hold(WorkPlan.build(row_slots))
        self.bound.hold(bind([self.deltas[i] for i in adapters], (QKV, HIDDEN)))
        self.weights.copy_(torch.rand(self.weights.shape, generator=generator(len(adapters))))

    def step(self, seed: int) -> None:
        """The next token of every row, of other numbers."""
        self.x.copy_(torch.randn(self.x.shape, generator=generator(seed)))
        self.slots += 1
        self.lengths += 1

    def run(self) -> Tensor:
        normed = rms_norm(self.x, self.norm, 1e-5)
        qkv = linear(normed, self.qkv, True, "cpu", self.bias)
        apply(qkv, normed, self.bound, self.plan, self.weights)
        k_pages, v_pages = self.pages
        rotate_and_write(qkv, self.cos, self.sin, k_pages, v_pages, self.slots)
        query = qkv.view(ROWS, -1, DIM)[:, :HEADS]
        attended = paged_attention(
            query, k_pages, v_pages, self.table, self.starts, self.lengths, 0.25
        )
        added = linear(attended.view(ROWS, -1), self.o, True)
        normed = fused_add_rms_norm(self.x, added, self.norm, 1e-5)
        return silu_and_mul(linear(normed, self.up, True))


def test_a_replay_computes_what_the_kernels_would(threads: int) -> None:
    kept, again = Layer(), Layer()
    program = program_pool().capture(kept.run)
    assert torch.equal(program.result, again.run())
    seen = [program.result.clone()]
    for seed in range(1, 6):
        if seed == 3:
            for layer in (kept, again):
                layer.give([(2,), (0, 1), (), (1,), (2, 0)], [2, 0, 1])
        kept.step(seed)
        again.step(seed)
        assert torch.equal(program.replay(), again.run())
        assert torch.equal(kept.x, again.x)
        assert all(torch.equal(a, b) for a, b in zip(kept.pages, again.pages, strict=True))
        assert not any(torch.equal(program.result, before) for before in seen)
        seen.append(program.result.clone())


def test_only_its_own_thread_is_recorded() -> None:
    layer, other = Layer(), Layer()

    def run() -> Tensor:
        beside = threading.Thread(target=other.run)
        beside.start()
        beside.join()
        return layer.run()

    program = program_pool().capture(run)
    before = other.pages[0].clone()
    other.step(1)
    layer.step(1)
    program.replay()
    assert torch.equal(other.pages[0], before)
    assert not torch.equal(layer.pages[0], before)


def test_programs_share_memory_but_not_results() -> None:
    x, weight = torch.randn(3, 33, generator=generator(1)), torch.ones(33)
    pool = program_pool()

    def chain(length: int) -> Callable[[], Tensor]:
        def run() -> Tensor:
            y = x
            for _ in range(length):
                y = rms_norm(y, weight, 0.5)
            return y

        return run

    short = pool.capture(chain(2))
    after_one = pool.nbytes
    long = pool.capture(chain(50))
    assert pool.nbytes == after_one + 8 * 33 * 4  # one more result; eight rows are a tile
    wanted = [chain(2)(), chain(50)()]
    assert torch.equal(short.replay(), wanted[0])
    assert torch.equal(long.replay(), wanted[1])
    assert torch.equal(short.result, wanted[0])
    assert short.result.data_ptr() % 64 == 0
    del short
    pool.capture(chain(7))
    assert pool.nbytes == after_one + 8 * 33 * 4


@pytest.mark.parametrize(
    ("function", "operation"),
    [
        (lambda x, w: rms_norm(x, w, 1e-5) + 1, "aten.add"),
        (lambda x, w: rms_norm(x, w, 1e-5).mul_(2), "aten.mul_"),
        (lambda x, w: linear(x.repeat(9, 1), torch.ones(8, 8), True), "aten.repeat"),
        (lambda x, w: x[:1], "nothing"),
    ],
)
def test_what_torch_computes_is_refused(
    function: Callable[[Tensor, Tensor], Tensor], operation: str
) -> None:
    x, weight = torch.ones(3, 8), torch.ones(8)
    pool = program_pool()
    with pytest.raises(NotCapturableError, match=operation):
        pool.capture(lambda: function(x, weight))
    wanted = rms_norm(x, weight, 1e-5)
    program = pool.capture(lambda: rms_norm(x, weight, 1e-5))
    assert torch.equal(program.replay(), wanted)
    assert torch.equal(rms_norm(x, weight, 1e-5) + 1, wanted + 1)


def test_a_product_of_the_library_is_refused() -> None:
    x, weight = torch.ones(40, 16), torch.ones(16, 16)
    with pytest.raises(NotCapturableError, match=r"aten\.mm"):
        program_pool().capture(lambda: linear(x, weight, True))


def test_an_index_outside_its_memory_is_an_error_of_that_replay(threads: int) -> None:
    layer = Layer()
    x = layer.x.clone()
    program = program_pool().capture(layer.run)
    wanted = program.result.clone()
    for indices, bad in ((layer.slots, ROWS * PAGE), (layer.slots, -1), (layer.table, ROWS)):
        good = indices.clone()
        indices[2] = bad
        with pytest.raises(IndexRangeError):
            program.replay()
        indices.copy_(good)
        layer.x.copy_(x)
        assert torch.equal(program.replay(), wanted)


def test_the_reference_records_nothing() -> None:
    with pytest.raises(BackendUnavailableError):
        program_pool("reference")
