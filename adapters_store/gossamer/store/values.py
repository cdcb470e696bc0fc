"""The dtypes a delta's values may have, and numpy's carriers for them.

numpy has no bfloat16, so its bits travel as uint16 and are converted here.
"""

from __future__ import annotations

import struct
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

ValueDtype = Literal["F32", "F16", "BF16"]

#: numpy's carrier of each value dtype; little-endian, as in the file.
CARRIER: dict[ValueDtype, np.dtype[Any]] = {
    "F32": np.dtype("<f4"),
    "F16": np.dtype("<f2"),
    "BF16": np.dtype("<u2"),
}

#: For each value dtype: its bits as an unsigned integer, the mask that drops the sign, and
#: infinity. With the sign dropped, the bits of floats order as their magnitudes do.
_BITS: dict[ValueDtype, tuple[np.dtype[Any], int, int]] = {
    "F32": (np.dtype("<u4"), 0x7FFF_FFFF, 0x7F80_0000),
    "F16": (np.dtype("<u2"), 0x7FFF, 0x7C00),
    "BF16": (np.dtype("<u2"), 0x7FFF, 0x7F80),
}


def bf16_from_f32(values: ArrayLike) -> NDArray[np.uint16]:
    """float32 → bfloat16 bits, rounded to nearest, ties to even; NaN stays NaN, overflow is inf."""
    bits = np.ascontiguousarray(values, dtype="<f4").view("<u4")
    odd = (bits >> np.uint32(16)) & np.uint32(1)
    rounded: NDArray[np.uint16] = ((bits + odd + np.uint32(0x7FFF)) >> np.uint32(16)).astype("<u2")
    nan = (bits & np.uint32(0x7FFF_FFFF)) > 0x7F80_0000
    if nan.any():
        rounded[nan] = ((bits[nan] >> np.uint32(16)) | np.uint32(0x40)).astype("<u2")
    return rounded


def f32_from_bf16(bits: NDArray[np.uint16]) -> NDArray[np.float32]:
    """bfloat16 bits → float32, exactly."""
    widened: NDArray[np.float32] = (bits.astype("<u4") << np.uint32(16)).view("<f4")
    return widened


def to_carrier(values: NDArray[Any], value_dtype: ValueDtype) -> NDArray[Any]:
    """Floats rounded once to `value_dtype`, in its carrier; bfloat16 bits (uint16) pass through.

    Raises:
        TypeError: `values` are neither.
    """
    if value_dtype == "BF16" and values.dtype == np.uint16:
        return np.ascontiguousarray(values, dtype="<u2")
    if values.size and values.dtype.kind != "f":
        message = f"values must be floats, not {values.dtype}"
        raise TypeError(message)
    with np.errstate(over="ignore"):  # what overflows becomes inf, which no delta may hold
        if value_dtype == "BF16":
            return bf16_from_f32(values)
        return np.ascontiguousarray(values, dtype=CARRIER[value_dtype])


def from_carrier(values: NDArray[Any], value_dtype: ValueDtype) -> NDArray[np.float32]:
    """What a carrier holds, as a new float32 array; exact for every value dtype."""
    if value_dtype == "BF16":
        return f32_from_bf16(values)
    return values.astype(np.float32)


def bits(values: NDArray[Any], value_dtype: ValueDtype) -> NDArray[Any]:
    """The carrier's bits as unsigned integers, a view."""
    return values.view(_BITS[value_dtype][0])


def magnitude_bits(values: NDArray[Any], value_dtype: ValueDtype) -> NDArray[Any]:
    """The bits without the sign: unsigned integers that order as the magnitudes do."""
    unsigned, mask, _ = _BITS[value_dtype]
    masked: NDArray[Any] = values.view(unsigned) & unsigned.type(mask)
    return masked


def infinity_bits(value_dtype: ValueDtype) -> int:
    """The magnitude bits of infinity; those of a NaN are larger."""
    return _BITS[value_dtype][2]


def magnitude(bits_without_sign: int, value_dtype: ValueDtype) -> float:
    """The float whose magnitude bits these are."""
    if value_dtype == "F16":
        (found,) = struct.unpack("<e", struct.pack("<H", bits_without_sign))
    else:
        widened = bits_without_sign << 16 if value_dtype == "BF16" else bits_without_sign
        (found,) = struct.unpack("<f", struct.pack("<I", widened))
    return float(found)
