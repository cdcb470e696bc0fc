"""Mixes: weighted merges of adapters, and what the engine must apply to serve one."""

from gossamer.merge.align import warm_up
from gossamer.merge.compiler import Compiled, compile_mix
from gossamer.merge.errors import MissingMemberError, MixError
from gossamer.merge.methods import METHODS, Method, Parameter, method_named
from gossamer.merge.mix import BASE, MAX_MEMBERS, MAX_WEIGHT, Member, Mix, canonical

__all__ = [
    "BASE",
    "MAX_MEMBERS",
    "MAX_WEIGHT",
    "METHODS",
    "Compiled",
    "Member",
    "Method",
    "MissingMemberError",
    "Mix",
    "MixError",
    "Parameter",
    "canonical",
    "compile_mix",
    "method_named",
    "warm_up",
]
