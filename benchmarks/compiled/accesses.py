"""What an instruction is: an access to global memory and how wide, a spill, a matrix product."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

from benchmarks.compiled.machine_code import Instruction, Program, loops

_AMD_ACCESS = re.compile(
    r"(?:global|buffer|flat)_(load|store)_(?:lds_)?[us]?(byte|short|dword)(?:x(\d))?"
)
_AMD_BITS = {"byte": 8, "short": 16, "dword": 32}


@dataclass(frozen=True, slots=True)
class Access:
    """One instruction's access to global memory: `bits` of a lane, "load" or "store"."""

    kind: str
    bits: int


def access(it: Instruction) -> Access | None:
    """What the instruction reads or writes in global memory; None if it does not.

    Copies from global into shared memory (LDGSTS, global_load_lds_*) count as loads. AMD's scalar
    loads (s_load_*), which fetch a kernel's arguments, do not.
    """
    name, *modifiers = it.opcode.split(".")
    if name in ("LDG", "LD", "LDGSTS", "STG", "ST"):
        widths = [_sass_bits(modifier) for modifier in modifiers]
        kind = "store" if name in ("STG", "ST") else "load"
        return Access(kind, next((bits for bits in widths if bits), 32))
    if found := _AMD_ACCESS.match(it.opcode):
        return Access(found[1], _AMD_BITS[found[2]] * int(found[3] or 1))
    return None


def _sass_bits(modifier: str) -> int:
    if modifier in ("64", "128", "256"):
        return int(modifier)
    return int(modifier[1:]) if modifier in ("U8", "S8", "U16", "S16") else 0


def is_spill(it: Instruction) -> bool:
    """Whether it reads or writes a thread's own memory, where registers go that do not fit."""
    return it.opcode.split(".")[0] in ("LDL", "STL") or it.opcode.startswith("scratch_")


def is_matrix_product(it: Instruction) -> bool:
    """Whether it runs on tensor cores (HMMA, IMMA, HGMMA, …) or on AMD's matrix cores (mfma)."""
    name = it.opcode.split(".")[0]
    return name.endswith(("HMMA", "IMMA", "GMMA", "QMMA", "DMMA")) or name.startswith("v_mfma")


def is_multiply_add(it: Instruction) -> bool:
    """Whether it is a scalar fp32 multiplication or multiply-add; v_pk_* are two at once."""
    name = it.opcode.split(".")[0]
    return name in ("FFMA", "FMUL") or name.startswith(("v_fma_f32", "v_fmac_f32", "v_mul_f32"))


def is_barrier(it: Instruction) -> bool:
    """Whether all threads of a block wait for each other."""
    return it.opcode.split(".")[0] == "BAR" or it.opcode == "s_barrier"


@dataclass(frozen=True, slots=True)
class Tally:
    """Counts over one program; of the accesses, by bits.

    Attributes:
        loads, stores: all accesses to global memory.
        loop_loads: the loads that can repeat.
        spills: instructions that read or write a thread's own memory.
        matrix_products: instructions on tensor cores.
        inner_barriers: barriers in loops that have no loop inside.
        instructions, loop_instructions: all, and those that can repeat.
    """

    loads: Counter[int]
    stores: Counter[int]
    loop_loads: Counter[int]
    spills: int
    matrix_products: int
    inner_barriers: int
    instructions: int
    loop_instructions: int


def tally(program: Program) -> Tally:
    """Counts a program's instructions."""
    found = loops(program)
    repeated = sorted({i for loop in found for i in loop.members})
    innermost = [program.instructions[i] for loop in found if loop.innermost for i in loop.members]
    inside = [program.instructions[i] for i in repeated]
    return Tally(
        loads=_widths(program.instructions, "load"),
        stores=_widths(program.instructions, "store"),
        loop_loads=_widths(inside, "load"),
        spills=sum(map(is_spill, program.instructions)),
        matrix_products=sum(map(is_matrix_product, program.instructions)),
        inner_barriers=sum(map(is_barrier, innermost)),
        instructions=len(program.instructions),
        loop_instructions=len(inside),
    )


def _widths(instructions: Iterable[Instruction], kind: str) -> Counter[int]:
    found = [access(it) for it in instructions]
    return Counter(each.bits for each in found if each is not None and each.kind == kind)
