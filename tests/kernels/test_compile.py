"""Every Triton kernel compiles for three cards, without a card, and stays as good as it was.

The compiling happens in a process of its own: this one may have TRITON_INTERPRET set, and then
Triton's kernels are plain functions. That process also imports this file, for the kernels below.
"""

from __future__ import annotations

import csv
import importlib
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import triton
import triton.language as tl

from gossamer.kernels.gpu.variant import Variant

ROOT = Path(__file__).parents[2]
TABLE = Path(__file__).parent / "compiled.csv"
TARGETS = {"sm_80", "sm_90", "gfx942"}

Report = dict[tuple[str, str], dict[str, str]]


@triton.jit
def _sum_rows(x, y, n, B: tl.constexpr):
    total = tl.zeros((B,), tl.float32)
    lanes = tl.arange(0, B)
    for i in range(n):
        total += tl.load(x + i * B + lanes).to(tl.float32)
    tl.store(y + lanes, total)


@triton.jit
def _many_sums(x, y, n, B: tl.constexpr, C: tl.constexpr):
    rows, columns = tl.arange(0, B)[:, None], tl.arange(0, C)[None, :]
    total = tl.zeros((B, C), tl.float32)
    for i in range(n):
        total += tl.load(x + i * B + rows) * tl.load(x + i * C + columns)
    tl.store(y + rows * C + columns, total)


@triton.jit
def _product(x, y, B: tl.constexpr):
    at = tl.arange(0, B)[:, None] * B + tl.arange(0, B)[None, :]
    tile = tl.load(x + at)
    tl.store(y + at, tl.dot(tile, tile))


@triton.jit
def _not_a_kernel(x):
    tl.store(x, tl.load(x) + "one")


_ADDRESSES = {"x": "*bf16:16", "y": "*fp32:16"}

VARIANTS = (
    Variant("toy_sum", _sum_rows, {**_ADDRESSES, "n": "i32"}, {"B": 1024}, needs_load_bits=128),
    # The same kernel without the promise that rows begin at multiples of 16 bytes.
    Variant("toy_narrow", _sum_rows, {"x": "*bf16", "y": "*fp32", "n": "i32"}, {"B": 1024},
            needs_load_bits=128),
    Variant("toy_product", _product, _ADDRESSES, {"B": 64}, tensor_cores=True),
    Variant("toy_no_product", _sum_rows, {**_ADDRESSES, "n": "i32"}, {"B": 1024},
            tensor_cores=True),
    # 256 sums in each thread on CUDA, 128 on AMD, where so many threads leave room for 128.
    Variant("toy_spills", _many_sums, {"x": "*fp32:16", "y": "*fp32:16", "n": "i32"},
            {"B": 256, "C": 512}, num_warps=16),
    Variant("toy_broken", _not_a_kernel, {"x": "*fp32:16"}),
)  # fmt: skip


def compile_in_a_process(folder: Path, *arguments: str) -> Report:
    """Runs `python -m benchmarks.compiled`; its lines by name and target."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    path = folder / "compiled.csv"
    command = [sys.executable, "-W", "error", "-m", "benchmarks.compiled", "--csv", str(path)]
    done = subprocess.run(
        [*command, *arguments], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert path.exists(), done.stderr
    with path.open(newline="") as file:
        lines = list(csv.DictReader(file))
    assert done.returncode == (1 if any(line["faults"] for line in lines) else 0), done.stderr
    return {(line["name"], line["target"]): line for line in lines}


@pytest.fixture(scope="module")
def toys(tmp_path_factory) -> Report:
    """Compared with a table that is wrong about three of them."""
    folder = tmp_path_factory.mktemp("toys")
    lines = [_table_line(v.name, target) for v in VARIANTS for target in TARGETS]
    lines.append(_table_line("toy_gone", "sm_90"))
    for line in lines:
        if line["target"] == "sm_90":
            line["registers"] = "5" if line["name"] == "toy_sum" else line["registers"]
            line["widest_load"] = "256" if line["name"] == "toy_product" else "0"
    lines.remove(_table_line("toy_product", "sm_80"))
    table = folder / "table.csv"
    with table.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(lines[0]))
        writer.writeheader()
        writer.writerows(lines)
    return compile_in_a_process(folder, "--module", __name__, "--check", str(table))


def _table_line(name: str, target: str) -> dict[str, str]:
    return {
        "name": name,
        "target": target,
        "registers": "256",
        "shared_bytes": "0",
        "widest_load": "0",
        "triton": triton.__version__,
    }


@pytest.fixture(scope="module")
def kernels(tmp_path_factory, test_cache: Path) -> Report:
    """Kept from run to run: Triton compiles again only what has changed."""
    cache = test_cache / "triton"
    folder = tmp_path_factory.mktemp("kernels")
    return compile_in_a_process(folder, "--check", str(TABLE), "--cache", str(cache))


def faults_of(report: Report, name: str) -> dict[str, str]:
    return {target: line["faults"] for (n, target), line in report.items() if n == name}


@pytest.mark.parametrize("target", sorted(TARGETS))
def test_compile_every_kernel(kernels: Report, target: str) -> None:
    mine = {name: line["faults"] for (name, t), line in kernels.items() if t == target}
    assert mine
    assert {name: faults for name, faults in mine.items() if faults} == {}


def test_compile_sound_kernels_have_no_faults(toys: Report) -> None:
    assert toys["toy_sum", "sm_80"]["faults"] == toys["toy_sum", "gfx942"]["faults"] == ""
    assert toys["toy_product", "gfx942"]["faults"] == ""
    assert all(int(toys["toy_product", target]["matrix_products"]) > 0 for target in TARGETS)


def test_compile_tells_loads_in_loops_from_others(toys: Report) -> None:
    for target in TARGETS:
        width = "64×" if target == "gfx942" else "128×"
        assert toys["toy_sum", target]["loop_loads"].startswith(width)
        assert toys["toy_product", target]["loop_loads"] == ""
        assert toys["toy_product", target]["loads"]


def test_compile_a_spill_is_a_fault(toys: Report) -> None:
    faults = faults_of(toys, "toy_spills")
    assert set(faults) == TARGETS
    assert all("spills" in fault for fault in faults.values())


def test_compile_a_lost_vector_load_is_a_fault(toys: Report) -> None:
    faults = faults_of(toys, "toy_narrow")
    assert set(faults) == TARGETS
    assert all("lost its loads of" in fault for fault in faults.values())


def test_compile_a_missing_matrix_product_is_a_fault(toys: Report) -> None:
    assert faults_of(toys, "toy_no_product") == dict.fromkeys(TARGETS, "uses no tensor cores")


def test_compile_an_error_is_the_fault_of_its_kernel(toys: Report) -> None:
    assert all("does not compile" in f for f in faults_of(toys, "toy_broken").values())


def test_compile_what_is_worse_than_the_table_is_a_fault(toys: Report) -> None:
    taken = toys["toy_sum", "sm_90"]["registers"]
    assert toys["toy_sum", "sm_90"]["faults"] == f"takes {taken} registers, took 5"
    assert toys["toy_product", "sm_90"]["faults"] == "loads 128 bits at most, loaded 256"
    assert toys["toy_product", "sm_80"]["faults"] == "is not in the table"
    assert "not among the variants" in toys["toy_gone", "sm_90"]["faults"]


def machine_code() -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(ROOT)
        return importlib.import_module("benchmarks.compiled.machine_code")


def parsed(assembly: str) -> Any:
    """One instruction a line, labels on lines of their own."""
    lines = [
        line if line.startswith(".") else f"  /*{16 * i:04x}*/  {line} ;"
        for i, line in enumerate(assembly.strip().splitlines())
    ]
    return machine_code().parse_sass("\n".join(lines))


def repeated(assembly: str) -> set[str]:
    """Opcodes inside loops."""
    program = parsed(assembly)
    found = machine_code().loops(program)
    return {program.instructions[i].opcode for loop in found for i in loop.members}


def test_compile_nested_loops_are_told_apart() -> None:
    text = """
.L_0:
IADD3 R0, R0, 1
.L_1:
LDG.E.128 R4, desc[UR4][R2.64]
@P0 BRA `(.L_1)
@!P1 BRA `(.L_0)
STG.E R4, R2
@P2 EXIT
BRA `(.L_2)
IMAD R9, R9, R9
.L_2:
EXIT"""
    program = parsed(text)
    outer, inner = machine_code().loops(program)
    assert [program.instructions[i].opcode for i in outer.members] == [
        "IADD3", "LDG.E.128", "BRA", "BRA",
    ]  # fmt: skip
    assert [program.instructions[i].opcode for i in inner.members] == ["LDG.E.128", "BRA"]
    assert (outer.innermost, inner.innermost) == (False, True)
    assert repeated(text) == {"IADD3", "LDG.E.128", "BRA"}


def test_compile_what_a_loop_calls_or_jumps_to_is_in_the_loop() -> None:
    called = """
.L_0:
CALL.REL.NOINC `(.F)
@P0 BRA `(.L_0)
EXIT
.F:
MUFU.RCP R0, R1
RET.REL.NODEC R4 `(.L_0)"""
    assert "MUFU.RCP" in repeated(called)
    apart = """
.K:
IMAD R1, R1, R1
CALL.REL.NOINC `(.F)
EXIT
.F:
MUFU.RCP R0, R1
RET.REL.NODEC R4 `(.K)"""
    assert repeated(apart) == set()
    jumped = """
.L_0:
BRX R32 -0xe30 (*"BRANCH_TARGETS .L_1,.L_2"*)
.L_1:
LDG.E R4, R2
.L_2:
@P0 BRA `(.L_0)
EXIT"""
    assert "LDG.E" in repeated(jumped)
    with pytest.raises(machine_code().UnknownFlowError, match="BRX R32"):
        repeated("BRX R32 -0xe30\nEXIT")
