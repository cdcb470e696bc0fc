"""The entropy coding of positions and values: byte planes through zstandard.

**Positions.** A sorted random mask is its gaps, and gaps of density p cost H(p)/p bits, the floor.
Each gap is split: its low `shift` bits are close to uniform and stored as they are, packed in
nibbles and bytes; what is above them has an alphabet small enough for zstandard's Huffman coder.
Measured on random masks, bits of positions over the floor (`benchmarks/format.py` repeats it):

    density              0.05 %   0.5 %    1 %     10 %
    this coding           1.007   1.006   1.006   1.012
    gaps without a split  1.008   1.087   1.063   1.012
    Rice                  1.007   1.004   1.004   1.014

Rice is as small and needs a bit coder of our own; whole gaps in byte planes need none and miss the
target of 1.06. A split at a nibble takes three lines of numpy.

**Values.** Byte planes: the planes that hold exponents compress to about 3 bits, the mantissas do
not compress. Rotating the sign out of the exponent's plane gains 0.05 bits, not worth another form.

Every plane is one zstandard frame that declares its content size and carries a checksum. Level 1:
on such data level 3 finds spurious matches and is larger, level 19 gains 0.3 bits for 50× the time.
"""

from __future__ import annotations

from typing import Any, NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray

from gossamer.store.format.container import invalid

_LEVEL = 1

_Int = TypeVar("_Int", np.int64, np.uint32)


class Gaps(NamedTuple):
    """Positions as gaps: the packed low bits (None without any) and the planes above them."""

    shift: int
    low: bytes | None
    high: list[bytes]


def compress(plane: NDArray[np.uint8]) -> bytes:
    """One zstandard frame, with its content size and a checksum."""
    import zstandard  # not at the top: a `raw` file is read with numpy alone

    compressor = zstandard.ZstdCompressor(
        level=_LEVEL, write_checksum=True, write_content_size=True
    )
    return compressor.compress(np.ascontiguousarray(plane).data)


def decompress(frame: bytes, size: int, tensor: str) -> NDArray[np.uint8]:
    """The `size` bytes of one frame; the frame must declare that size before anything is decoded.

    Raises:
        AdapterFileError: another size, another number of frames, a dictionary, or damage.
    """
    import zstandard

    try:
        header = zstandard.get_frame_parameters(frame)
        if header.content_size != size:
            invalid(f"the compressed tensor does not declare the {size} bytes it must hold", tensor)
        if header.dict_id or not header.has_checksum:
            invalid("the compressed tensor has no checksum, or needs a dictionary", tensor)
        plane = zstandard.ZstdDecompressor().decompress(
            frame, max_output_size=size, allow_extra_data=False
        )
    except zstandard.ZstdError as error:
        invalid(f"the compressed tensor is damaged: {error}", tensor)
    if len(plane) != size:
        invalid(f"the compressed tensor holds {len(plane)} bytes instead of {size}", tensor)
    return np.frombuffer(plane, np.uint8)


def gaps_of(positions: NDArray[np.int64]) -> NDArray[np.int64]:
    """What lies between the strictly increasing positions of one weight: how many are skipped."""
    gaps = np.diff(positions, prepend=np.int64(-1))
    gaps -= 1
    return gaps


def encode_gaps(gaps: NDArray[np.int64], shifts: tuple[int, ...]) -> Gaps:
    """The smallest coding over the allowed shifts."""
    mean = max(float(gaps.mean()), 1.0) if gaps.size else 1.0
    candidates = [_split(gaps, shift) for shift in shifts if shift == 0 or 2**shift <= 2 * mean]
    return min(candidates, key=lambda coded: len(coded.low or b"") + sum(map(len, coded.high)))


def _split(gaps: NDArray[np.int64], shift: int) -> Gaps:
    low = compress(_pack_low(gaps, shift)) if shift else None
    above = gaps >> shift
    planes = max(1, -(-int(above.max(initial=0)).bit_length() // 8))
    return Gaps(shift, low, [compress(_byte(above, index)) for index in range(planes)])


def _byte(numbers: NDArray[np.int64], index: int) -> NDArray[np.uint8]:
    return (numbers >> (8 * index)).astype(np.uint8)


def _pack_low(gaps: NDArray[np.int64], shift: int) -> NDArray[np.uint8]:
    """Whole bytes plane by plane, then the odd nibble, two to a byte, the earlier one low."""
    planes = [_byte(gaps, index) for index in range(shift // 8)]
    if shift % 8:
        nibbles = _byte(gaps, shift // 8) & np.uint8(15)
        nibbles = np.append(nibbles, np.zeros(nibbles.size % 2, np.uint8))
        planes.append(nibbles[0::2] | (nibbles[1::2] << np.uint8(4)))
    return np.concatenate(planes)


def low_bytes(count: int, shift: int) -> int:
    """Size of the packed low bits."""
    return count * (shift // 8) + (-(-count // 2) if shift % 8 else 0)


def decode_gaps(
    low: NDArray[np.uint8] | None, high: list[NDArray[np.uint8]], shift: int, count: int
) -> NDArray[np.int64] | NDArray[np.uint32]:
    """Gap + 1 of every position, [count]; at most 2^56, so that a sum that wraps shows."""
    if shift + 8 * len(high) < 32:
        return _join_planes(low, high, shift, np.zeros(count, np.uint32))
    return _join_planes(low, high, shift, np.zeros(count, np.int64))


def _join_planes(
    low: NDArray[np.uint8] | None, high: list[NDArray[np.uint8]], shift: int, steps: NDArray[_Int]
) -> NDArray[_Int]:
    wide, count = steps.dtype.type, steps.size
    for plane in reversed(high):
        np.left_shift(steps, wide(8), out=steps)
        np.bitwise_or(steps, plane, out=steps)
    if low is not None:
        if shift % 8:
            packed = low[count * (shift // 8) :]
            nibbles = np.empty(2 * packed.size, np.uint8)
            np.bitwise_and(packed, 15, out=nibbles[0::2])
            np.right_shift(packed, 4, out=nibbles[1::2])
            np.left_shift(steps, wide(4), out=steps)
            np.bitwise_or(steps, nibbles[:count], out=steps)
        for index in reversed(range(shift // 8)):
            np.left_shift(steps, wide(8), out=steps)
            np.bitwise_or(steps, low[count * index : count * (index + 1)], out=steps)
    np.add(steps, wide(1), out=steps)
    return steps


def encode_planes(values: NDArray[Any]) -> list[bytes]:
    """The byte planes of little-endian values, each compressed, least significant first."""
    width = values.dtype.itemsize
    planes = np.ascontiguousarray(values).view(np.uint8).reshape(-1, width)
    return [compress(planes[:, index]) for index in range(width)]


def decode_planes(planes: list[NDArray[np.uint8]], dtype: np.dtype[Any]) -> NDArray[Any]:
    """The values, flat, from their byte planes."""
    interleaved = np.empty((planes[0].size, len(planes)), np.uint8)
    for index, plane in enumerate(planes):
        interleaved[:, index] = plane
    return interleaved.view(dtype).ravel()
