"""Triton's interpreter, where there is no card: set up before anything imports Triton."""

from __future__ import annotations

import functools
import os
from pathlib import Path
from typing import Any

_CARDS = (Path("/dev/nvidia0"), Path("/dev/kfd"))


def choose_interpreter() -> None:
    """Have Triton interpret kernels if this machine has no card; a setting from outside stands."""
    if not any(card.exists() for card in _CARDS):
        os.environ.setdefault("TRITON_INTERPRET", "1")


@functools.cache
def mend_interpreter() -> None:
    """Make the interpreter compute with bfloat16 as every card does.

    Triton 3.9's truncates where float32 becomes bfloat16, one bit off in half of all cases, and
    multiplies matrices of bfloat16 by their bit patterns.
    """
    import numpy as np
    import torch
    import triton.language as tl
    from triton.runtime import interpreter

    convert, builder = interpreter._convert_float, interpreter.InterpreterBuilder
    dot = builder.create_dot

    def rounded(data: Any, source: Any, target: Any, rounding: Any) -> Any:
        if source == tl.float32 and target == tl.bfloat16:
            wide = torch.from_numpy(np.ascontiguousarray(data).view(np.float32))
            return wide.to(torch.bfloat16).view(torch.int16).numpy().view(np.uint16)
        return convert(data, source, target, rounding)

    def widened(handle: Any) -> Any:
        if handle.dtype.scalar != tl.bfloat16:
            return handle
        bits = np.ascontiguousarray(handle.data).view(np.uint16).astype(np.uint32) << 16
        return interpreter.TensorHandle(bits.view(np.float32), tl.float32)

    def dot_of_floats(self: Any, a: Any, b: Any, *others: Any) -> Any:
        return dot(self, widened(a), widened(b), *others)

    interpreter._convert_float = rounded
    builder.create_dot = dot_of_floats
