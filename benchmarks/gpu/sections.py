"""All sections, in the order in which they are run."""

from __future__ import annotations

from typing import Final

from benchmarks.gpu.bench import Section
from benchmarks.gpu.ceilings import ceilings
from benchmarks.gpu.decode import decode
from benchmarks.gpu.kernels import copies, entries, layouts, tiles
from benchmarks.gpu.layers import attention, consumers
from benchmarks.gpu.lora import lora
from benchmarks.gpu.moving import fusing, packing, prefill
from benchmarks.gpu.traffic import traffic, zipf

#: What the targets are for comes first. The seconds are the most that each may take, together about
#: the ten minutes of a whole run; where a section needs less, those behind it begin earlier.
SECTIONS: Final = (
    Section("ceilings", 15, ceilings),
    Section("decode", 170, decode),
    Section("entries", 60, entries),
    Section("fuse", 40, fusing),
    Section("prefill", 35, prefill),
    Section("traffic", 60, traffic),
    Section("lora", 25, lora),
    Section("tiles", 30, tiles),
    Section("consumers", 10, consumers),
    Section("attention", 10, attention),
    Section("copies", 10, copies),
    Section("pack", 25, packing),
    Section("zipf", 60, zipf),
    Section("layouts", 40, layouts),
)
