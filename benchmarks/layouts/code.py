"""What the compiler made of a candidate's inner loop, without a card."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from benchmarks.compiled.accesses import access, is_barrier, is_matrix_product, is_multiply_add
from benchmarks.compiled.compiling import machine_code
from benchmarks.compiled.machine_code import Instruction, loops
from benchmarks.layouts.layout import Layout

#: The figures are for this card.
TARGET = "sm_90"


class UnknownLoopError(Exception):
    """The inner loop is not what the candidate's `step` says, so nothing can be said per entry."""

    def __init__(self, layout: str, width: int, detail: str) -> None:
        super().__init__(f"{layout}, {width} rows: {detail}")
        self.layout = layout
        self.width = width
        self.detail = detail


@dataclass(frozen=True, slots=True)
class InnerLoop:
    """The loop over the entries, for one number of rows.

    Attributes:
        registers: of a thread.
        stack_bytes: for what does not fit into them.
        per_slot: instructions of a thread for each place of an entry, idle places included.
        loads: of one round of the loop as it is in the source, by bits.
        barriers: of one such round.
        unrolled: how many such rounds the compiler made one.
    """

    registers: int
    stack_bytes: int
    per_slot: float
    loads: str
    barriers: float
    unrolled: int


def inner_loop(layout: Layout, width: int) -> InnerLoop:
    """Compiles a candidate's kernel and finds the loop that goes over the entries.

    Raises:
        UnknownLoopError: no innermost loop has a whole number of the products of a step.
    """
    variant = layout.variant(width)
    code = machine_code(variant, TARGET)
    step = layout.step(width)
    program = code.program
    bodies = [
        [program.instructions[i] for i in loop.members] for loop in loops(program) if loop.innermost
    ]
    body = max(bodies, key=_products, default=[])
    products = _products(body)
    unrolled, rest = divmod(products, step.products)
    if rest or not unrolled:
        detail = f"{products} products, a step has {step.products}"
        raise UnknownLoopError(layout.name, width, detail)
    return InnerLoop(
        registers=code.registers,
        stack_bytes=code.stack_bytes,
        per_slot=len(body) * 32 * variant.num_warps / (step.slots * unrolled),
        loads=_loads(body, unrolled),
        barriers=sum(map(is_barrier, body)) / unrolled,
        unrolled=unrolled,
    )


def _products(body: Sequence[Instruction]) -> int:
    """Those on tensor cores, if there are any: then the others are part of finding addresses."""
    return sum(map(is_matrix_product, body)) or sum(map(is_multiply_add, body))


def _loads(body: Sequence[Instruction], unrolled: int) -> str:
    found = [access(it) for it in body]
    counts = Counter(each.bits for each in found if each is not None and each.kind == "load")
    return " ".join(f"{bits}×{count / unrolled:g}" for bits, count in sorted(counts.items()))
