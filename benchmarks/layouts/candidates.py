"""All candidates."""

from __future__ import annotations

from benchmarks.layouts.bitmask import BITMASK
from benchmarks.layouts.csr import GROUPS, csr
from benchmarks.layouts.csr_words import CSR_WORDS
from benchmarks.layouts.layout import Layout
from benchmarks.layouts.positions import POSITIONS
from benchmarks.layouts.sell import sell

#: Rows of a step that the kernels are compiled for.
WIDTHS = (1, 16)
#: By bytes there are five; three more differ in how their kernels go over them.
CANDIDATES: tuple[Layout, ...] = (
    sell(256),
    sell(4096),
    POSITIONS,
    csr(8),
    csr(32),
    csr(128),
    CSR_WORDS,
    GROUPS,
    BITMASK,
)

VARIANTS = tuple(
    {
        variant.name: variant for layout in CANDIDATES for variant in map(layout.variant, WIDTHS)
    }.values()
)
