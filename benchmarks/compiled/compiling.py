"""A variant and a target in, what the compiler made of them out. Needs no GPU."""

from __future__ import annotations

import re
import subprocess
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from benchmarks.compiled.accesses import tally
from benchmarks.compiled.machine_code import Program, parse_amdgcn, parse_sass
from gossamer.kernels.gpu.variant import Variant

#: A100, H100 and H200, MI300.
TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}


class VariantError(Exception):
    """The variant does not describe a call of its kernel."""

    def __init__(self, variant: str, detail: str) -> None:
        super().__init__(f"variant {variant}: {detail}")
        self.variant = variant
        self.detail = detail


@dataclass(frozen=True, slots=True)
class Compiled:
    """What came out for one variant and target.

    Attributes:
        registers: of a thread. AMD: vector registers.
        stack_bytes: memory of a thread for what does not fit into its registers.
        spills: instructions that read or write that memory.
        moved_aside: AMD: registers that the compiler keeps in lanes of other registers, or in
            those of the matrix cores. It costs moves, and no memory.
        shared_bytes: shared memory of a block.
        loads, stores: accesses to global memory in the machine code, by bits of a lane.
        loop_loads: the loads among them that can repeat.
        matrix_products: instructions on tensor cores.
        inner_barriers: barriers of a block in its innermost loops.
        instructions, loop_instructions: all, and those that can repeat.
        code_bytes: size of the machine code.
        seconds: compile time of the process.
    """

    name: str
    target: str
    registers: int
    stack_bytes: int
    spills: int
    moved_aside: int
    shared_bytes: int
    loads: Mapping[int, int]
    loop_loads: Mapping[int, int]
    stores: Mapping[int, int]
    matrix_products: int
    inner_barriers: int
    instructions: int
    loop_instructions: int
    code_bytes: int
    seconds: float

    @property
    def widest_load(self) -> int:
        """Bits of the widest load that can repeat; of all loads, where none of them can."""
        return max(self.loop_loads or self.loads, default=0)

    def columns(self) -> dict[str, str]:
        """As columns of a CSV file; accesses as "16×4 128×2"."""
        return {each.name: _cell(getattr(self, each.name)) for each in fields(self)}

    @classmethod
    def no_columns(cls) -> dict[str, str]:
        """The same columns, empty."""
        return {each.name: "" for each in fields(cls)}


@dataclass(frozen=True, slots=True)
class MachineCode:
    """The machine code of a variant, taken apart, and what the assembler says of it."""

    program: Program
    registers: int
    stack_bytes: int
    moved_aside: int
    shared_bytes: int
    code_bytes: int
    seconds: float


def compile_variant(variant: Variant, target: str) -> Compiled:
    """Compiles, disassembles and counts.

    Raises:
        VariantError: the kernel is interpreted, or its arguments are not those of the variant.
        UnknownFlowError: see `machine_code`.
        Exception: whatever Triton raises for code that it cannot compile.
    """
    code = machine_code(variant, target)
    counts = tally(code.program)
    return Compiled(
        name=variant.name,
        target=target,
        registers=code.registers,
        stack_bytes=code.stack_bytes,
        spills=counts.spills,
        moved_aside=code.moved_aside,
        shared_bytes=code.shared_bytes,
        loads=counts.loads,
        loop_loads=counts.loop_loads,
        stores=counts.stores,
        matrix_products=counts.matrix_products,
        inner_barriers=counts.inner_barriers,
        instructions=counts.instructions,
        loop_instructions=counts.loop_instructions,
        code_bytes=code.code_bytes,
        seconds=round(code.seconds, 2),
    )


def machine_code(variant: Variant, target: str) -> MachineCode:
    """As `compile_variant`, without counting."""
    begin = time.perf_counter()
    kernel = triton.compile(_source(variant), target=TARGETS[target], options=variant.options)
    seconds = time.perf_counter() - begin
    shared = int(kernel.metadata.shared)
    if "amdgcn" in kernel.asm:
        return _amd(kernel.asm["amdgcn"], shared, seconds)
    return _cuda(kernel.asm["cubin"], shared, seconds)


def _source(variant: Variant) -> ASTSource:
    """Raises VariantError."""
    names = getattr(variant.kernel, "arg_names", None)
    if not isinstance(variant.kernel, triton.JITFunction) or names is None:
        raise VariantError(variant.name, "its kernel is not compiled (TRITON_INTERPRET is set)")
    given = {**variant.signature, **variant.constants}
    if set(given) != set(names) or len(given) != len(variant.signature) + len(variant.constants):
        raise VariantError(variant.name, f"says {sorted(given)}, the kernel takes {sorted(names)}")
    signature, attributes = {}, {}
    for index, name in enumerate(names):
        kind, _, divisor = variant.signature.get(name, "constexpr").partition(":")
        if divisor not in ("", "16"):
            raise VariantError(variant.name, f"{name}: only :16 can be told, not :{divisor}")
        signature[name] = kind
        if divisor:
            attributes[(index,)] = [["tt.divisibility", 16]]
    return ASTSource(variant.kernel, signature, dict(variant.constants), attributes)


def _cuda(cubin: bytes, shared: int, seconds: float) -> MachineCode:
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "kernel.cubin"
        file.write_bytes(cubin)
        usage = _tool(triton.knobs.nvidia.cuobjdump.path, "--dump-resource-usage", str(file))
        program = parse_sass(_disassembled(file))
    return MachineCode(
        program=program,
        registers=_number(r"REG:(\d+)", usage),
        stack_bytes=_number(r"STACK:(\d+)", usage) + _number(r"LOCAL:(\d+)", usage),
        moved_aside=0,
        shared_bytes=shared,
        code_bytes=16 * len(program.instructions),
        seconds=seconds,
    )


def _amd(assembly: str, shared: int, seconds: float) -> MachineCode:
    stack = _number(r"\.private_segment_fixed_size:\s*(\d+)", assembly)
    spilled = [_number(rf"\.{kind}_spill_count:\s*(\d+)", assembly) for kind in ("vgpr", "sgpr")]
    return MachineCode(
        program=parse_amdgcn(assembly),
        registers=_number(r"\.vgpr_count:\s*(\d+)", assembly),
        stack_bytes=stack,
        moved_aside=0 if stack else sum(spilled),
        shared_bytes=shared,
        code_bytes=_number(r"codeLenInByte = (\d+)", assembly),
        seconds=seconds,
    )


def _disassembled(file: Path) -> str:
    """SASS. Only data flow tells where jumps through registers go; it takes a third of the time."""
    path = triton.knobs.nvidia.nvdisasm.path
    text = _tool(path, "-c", "-ndf", str(file))
    return _tool(path, "-c", str(file)) if "BRX" in text else text


def _tool(path: str, *arguments: str) -> str:
    done = subprocess.run([path, *arguments], capture_output=True, text=True, check=True)
    return done.stdout


def _number(pattern: str, text: str) -> int:
    found = re.search(pattern, text)
    if found is None:
        raise ValueError(f"no {pattern} in the assembler's output")
    return int(found[1])


def _cell(value: Any) -> str:
    if isinstance(value, Mapping):
        return " ".join(f"{bits}×{count}" for bits, count in sorted(value.items()))
    return str(value)
