"""Disassembly as a graph: which instructions a kernel has, and which of them can repeat.

Two assembly languages: SASS as `nvdisasm -c` prints it, and the AMDGCN that LLVM writes. A program
is a list of instructions with the edges of its control flow; what lies on a cycle of that graph is
inside a loop. Where the flow is not known exactly (a subroutine with several callers), there are
more edges than paths, so an instruction that can repeat is never said not to.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass

_LABEL = re.compile(r"^([.$\w]+):")
_SASS = re.compile(r"/\*[0-9a-f]{4,}\*/\s+(@!?U?P\w+\s+)?([A-Z][\w.]*)\s*(.*?)\s*;")
_BRANCH_TARGETS = re.compile(r'BRANCH_TARGETS ([^"]+)"')
_AMDGCN = re.compile(r"^\s+([a-z]\w+)(?:\s+(.*?))?\s*(?:;.*)?$")
_AMDGCN_FAMILIES = ("s_", "v_", "ds_", "global_", "buffer_", "flat_", "scratch_")


class UnknownFlowError(Exception):
    """The code jumps to where only a register says, so its loops cannot be told."""

    def __init__(self, instruction: str) -> None:
        super().__init__(f"cannot tell where `{instruction}` goes")
        self.instruction = instruction


@dataclass(frozen=True, slots=True)
class Instruction:
    """One machine instruction.

    Attributes:
        opcode: with its modifiers ("LDG.E.128", "global_load_dwordx4").
        operands: the rest of the line, without the guard.
        guarded: whether a predicate decides that it executes (SASS; AMD's branches say it in their
            names).
    """

    opcode: str
    operands: str
    guarded: bool = False


@dataclass(frozen=True, slots=True)
class Program:
    """The instructions of a kernel, in the order of their addresses, and what may follow each."""

    instructions: Sequence[Instruction]
    successors: Sequence[Sequence[int]]


@dataclass(frozen=True, slots=True)
class Loop:
    """A cycle of the control flow with everything on it.

    Attributes:
        members: indices of its instructions, rising.
        innermost: whether it has no loop inside.
    """

    members: Sequence[int]
    innermost: bool


def parse_sass(text: str) -> Program:
    """A program from `nvdisasm -c`.

    Raises:
        UnknownFlowError: it has an indirect branch of which `nvdisasm` does not list the targets.
    """
    instructions: list[Instruction] = []
    labels: dict[str, int] = {}
    for line in text.splitlines():
        if label := _LABEL.match(line):
            labels[label[1]] = len(instructions)
        elif found := _SASS.search(line):
            instructions.append(Instruction(found[2], found[3], bool(found[1])))
    calls = [i for i, it in enumerate(instructions) if it.opcode.startswith("CALL")]
    returns = [i + 1 for i in calls]
    successors = [_after_sass(i, it, labels, returns) for i, it in enumerate(instructions)]
    return Program(*_without_padding(instructions, successors))


def parse_amdgcn(text: str) -> Program:
    """A program from the assembly that Triton keeps as `asm["amdgcn"]`.

    Raises:
        UnknownFlowError: it has a call or an indirect branch.
    """
    instructions: list[Instruction] = []
    labels: dict[str, int] = {}
    for line in text.splitlines():
        if label := _LABEL.match(line):
            labels[label[1]] = len(instructions)
        elif (found := _AMDGCN.match(line)) and found[1].startswith(_AMDGCN_FAMILIES):
            instructions.append(Instruction(found[1], found[2] or ""))
    end = len(instructions)
    successors = [_after_amdgcn(i, it, labels) for i, it in enumerate(instructions)]
    return Program(instructions, [[s for s in after if s < end] for after in successors])


def loops(program: Program) -> list[Loop]:
    """All loops, outer before inner."""
    return list(_loops(program.successors, range(len(program.instructions))))


def _after_sass(
    index: int, it: Instruction, labels: dict[str, int], returns: Sequence[int]
) -> list[int]:
    kind = it.opcode.split(".")[0]
    if kind in ("BRX", "JMX", "BRXU", "JMXU"):
        listed = _BRANCH_TARGETS.search(it.operands)
        if listed is None:
            raise UnknownFlowError(f"{it.opcode} {it.operands}")
        targets = [labels[name] for name in listed[1].split(",")]
        return [*targets, index + 1] if it.guarded else targets
    if kind == "RET":
        return [*returns, index + 1] if it.guarded else list(returns)
    target = re.search(r"`\(([^)]+)\)", it.operands)
    # A label on any other instruction is somewhere that it may lead to.
    after = [labels[target[1]]] if target and target[1] in labels else []
    if kind == "CALL" and not after:
        raise UnknownFlowError(f"{it.opcode} {it.operands}")
    # BRA.DIV and a branch with a predicate among its operands may go on.
    leaves = kind == "EXIT" or (it.opcode == "BRA" and it.operands.startswith("`("))
    if not leaves or it.guarded:
        after.append(index + 1)
    return after


def _without_padding(
    instructions: list[Instruction], successors: list[list[int]]
) -> tuple[list[Instruction], list[list[int]]]:
    """Without what stands behind the last real instruction: a branch to itself, and NOPs."""
    end = len(instructions)
    while end and (instructions[end - 1].opcode == "NOP" or end - 1 in successors[end - 1]):
        end -= 1
    return instructions[:end], [[s for s in after if s < end] for after in successors[:end]]


def _after_amdgcn(index: int, it: Instruction, labels: dict[str, int]) -> list[int]:
    if it.opcode in ("s_setpc_b64", "s_swappc_b64", "s_call_b64"):
        raise UnknownFlowError(f"{it.opcode} {it.operands}")
    if it.opcode == "s_endpgm":
        return []
    if it.opcode == "s_branch":
        return [labels[it.operands]]
    if it.opcode.startswith("s_cbranch"):
        return [labels[it.operands], index + 1]
    return [index + 1]


def _loops(successors: Sequence[Sequence[int]], among: Collection[int]) -> Iterator[Loop]:
    """Strongly connected parts, and inside each the same again without the edges to its entry."""
    inside = set(among)
    for part in _connected(successors, among):
        members = set(part)
        if len(part) == 1 and part[0] not in successors[part[0]]:
            continue
        entries = {
            after for before in inside - members for after in successors[before] if after in members
        } or {min(members)}
        cut = list(successors)
        for member in members:
            cut[member] = [s for s in successors[member] if s in members and s not in entries]
        inner = list(_loops(cut, part))
        yield Loop(sorted(members), not inner)
        yield from inner


def _connected(successors: Sequence[Sequence[int]], among: Collection[int]) -> list[list[int]]:
    """Tarjan's strongly connected components (1972), without recursion."""
    inside = set(among)
    order: dict[int, int] = {}
    low: dict[int, int] = {}
    stack: list[int] = []
    stacked: set[int] = set()
    found: list[list[int]] = []
    for root in among:
        if root in order:
            continue
        path: list[tuple[int, Iterator[int]]] = []
        _open(root, order, low, stack, stacked)
        path.append((root, iter(successors[root])))
        while path:
            node, rest = path[-1]
            child = next((c for c in rest if c in inside), None)
            if child is None:
                path.pop()
                if path:
                    low[path[-1][0]] = min(low[path[-1][0]], low[node])
                if low[node] == order[node]:
                    found.append(_close(node, stack, stacked))
            elif child not in order:
                _open(child, order, low, stack, stacked)
                path.append((child, iter(successors[child])))
            elif child in stacked:
                low[node] = min(low[node], order[child])
    return found


def _open(
    node: int, order: dict[int, int], low: dict[int, int], stack: list[int], stacked: set[int]
) -> None:
    order[node] = low[node] = len(order)
    stack.append(node)
    stacked.add(node)


def _close(node: int, stack: list[int], stacked: set[int]) -> list[int]:
    at = stack.index(node)
    part = stack[at:]
    del stack[at:]
    stacked.difference_update(part)
    return part
