"""What can be launched: a Triton kernel with the types and constants that it is compiled for.

Every module of this package that has kernels lists them as `VARIANTS`. The list is what the
compile checks go through (`python -m benchmarks.compiled`), without a card.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

#: Triton contracts a multiplication and an addition only where a kernel says `tl.fma`. Explicit,
#: because the default depends on Triton's version and sums must not.
FP_FUSION = False


@dataclass(frozen=True, eq=False, slots=True)
class Variant:
    """One compiled form of a kernel.

    Attributes:
        name: unique over all modules, e.g. "element_bf16_r4".
        kernel: a `triton.jit` function.
        signature: the type of every argument that is not a constant: "*bf16", "*u8", "i64",
            "fp32". A suffix ":16" says that launches always pass an address or a number divisible
            by 16 ("*bf16:16", "i32:16"), as Triton finds out by itself when it launches; wide
            loads depend on it.
        constants: the value of every `tl.constexpr` argument.
        num_warps, num_stages: as Triton takes them; None: Triton's default for the device.
        max_registers: of a thread; None leaves the choice to ptxas, which sometimes spills a few
            bytes for an occupancy that nobody asked for. CUDA only.
        needs_load_bits: the widest load from global memory that the machine code must contain,
            in bits of one lane of a warp of 32; inside a loop, if the kernel loads in loops. Warps
            of 64 lanes may share the data out and need half of it. 0: nothing asked.
        tensor_cores: whether the machine code must use matrix instructions.
    """

    name: str
    kernel: Any
    signature: Mapping[str, str]
    constants: Mapping[str, object] = field(default_factory=dict)
    num_warps: int = 4
    num_stages: int | None = None
    max_registers: int | None = None
    needs_load_bits: int = 0
    tensor_cores: bool = False

    @property
    def options(self) -> dict[str, Any]:
        """How to compile it; for a launch too: `kernel[grid](*arguments, **variant.options)`."""
        return options(self.num_warps, self.num_stages, self.max_registers)


def options(
    num_warps: int = 4, num_stages: int | None = None, max_registers: int | None = None
) -> dict[str, Any]:
    """Triton's options of a kernel, compiled or launched."""
    given = {"num_warps": num_warps, "num_stages": num_stages, "maxnreg": max_registers}
    chosen: dict[str, Any] = {key: value for key, value in given.items() if value is not None}
    return {**chosen, "enable_fp_fusion": FP_FUSION}
