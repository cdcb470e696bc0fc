"""What must hold of the machine code of every variant."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import triton

from benchmarks.compiled.compiling import TARGETS, Compiled
from gossamer.kernels.gpu.variant import Variant

#: How many registers more than the table says are allowed. The hardware gives them out by eight;
#: four are what moving a statement costs.
MORE_REGISTERS = 4

#: What the checked table says of a variant and target.
TABLE = ("name", "target", "registers", "shared_bytes", "widest_load", "triton")


def faults(variant: Variant, compiled: Compiled) -> list[str]:
    """What is wrong with the code of a variant by itself."""
    found = []
    if compiled.spills or compiled.stack_bytes:
        found.append(f"spills: {compiled.spills}, {compiled.stack_bytes} bytes of stack")
    needed = variant.needs_load_bits * 32 // TARGETS[compiled.target].warp_size
    if compiled.widest_load < needed:
        where = "in loops" if compiled.loop_loads else "at all"
        widest = f"the widest {where} has {compiled.widest_load}"
        found.append(f"lost its loads of {needed} bits; {widest}")
    if variant.tensor_cores and not compiled.matrix_products:
        found.append("uses no tensor cores")
    return found


def table_line(compiled: Compiled) -> dict[str, str]:
    """The line of the checked table that a compiled variant has."""
    columns = {
        **compiled.columns(),
        "widest_load": str(compiled.widest_load),
        "triton": triton.__version__,
    }
    return {name: columns[name] for name in TABLE}


def drifted(
    compiled: Iterable[Compiled], table: Sequence[Mapping[str, str]]
) -> dict[tuple[str, str], str]:
    """Where the code has become worse than the checked table, by name and target.

    A variant that the table does not have, and a line without a variant, are reported too.
    """
    known = {(line["name"], line["target"]): line for line in table}
    found = dict.fromkeys(known, "is in the table, but not among the variants")
    for each in compiled:
        key = (each.name, each.target)
        found.pop(key, None)
        line = known.get(key)
        if line is None:
            found[key] = "is not in the table"
        elif line["triton"] != triton.__version__:
            found[key] = f"is in the table as of Triton {line['triton']}, not {triton.__version__}"
        elif each.registers > int(line["registers"]) + MORE_REGISTERS:
            found[key] = f"takes {each.registers} registers, took {line['registers']}"
        elif each.widest_load < int(line["widest_load"]):
            found[key] = f"loads {each.widest_load} bits at most, loaded {line['widest_load']}"
    return found
