"""Foreign safetensors files, read with distrust, a tensor at a time."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gossamer.store.format.container import Rules, TensorInfo, invalid, parse_container
from gossamer.store.format.source import Readable, Source, open_source
from gossamer.store.values import CARRIER, ValueDtype, from_carrier

#: numpy's dtype of each tensor dtype; of those that numpy has none for, the bits.
DTYPES: Mapping[str, np.dtype[Any]] = {
    "BOOL": np.dtype("u1"),
    "U8": np.dtype("u1"),
    "I8": np.dtype("i1"),
    "F8_E4M3": np.dtype("u1"),
    "F8_E5M2": np.dtype("u1"),
    "U16": np.dtype("<u2"),
    "I16": np.dtype("<i2"),
    "F16": np.dtype("<f2"),
    "BF16": np.dtype("<u2"),
    "U32": np.dtype("<u4"),
    "I32": np.dtype("<i4"),
    "F32": np.dtype("<f4"),
    "U64": np.dtype("<u8"),
    "I64": np.dtype("<i8"),
    "F64": np.dtype("<f8"),
}
INTEGERS = ("U8", "I8", "U16", "I16", "U32", "I32", "I64")
#: Of a foreign file: a checkpoint of many experts has tens of thousands of tensors.
FOREIGN = Rules(
    {name: dtype.itemsize for name, dtype in DTYPES.items()},
    max_header_bytes=16 << 20,
    max_tensors=1 << 17,
    max_dimensions=8,
)


@dataclass(frozen=True)
class TensorFile:
    """An open safetensors file."""

    metadata: Mapping[str, str]
    infos: Mapping[str, TensorInfo]
    _source: Source

    def __contains__(self, name: str) -> bool:
        return name in self.infos

    def info(self, name: str) -> TensorInfo:
        """Dtype and shape of a tensor.

        Raises:
            AdapterFileError: there is none of that name.
        """
        if name not in self.infos:
            invalid("the tensor is missing", name)
        return self.infos[name]

    def read(self, name: str) -> NDArray[Any]:
        """A tensor as it is stored (`DTYPES`), read-only, of its own shape.

        Raises:
            AdapterFileError: there is none of that name, or numpy has no array of its shape.
        """
        info = self.info(name)
        data = self._source.read_at(info.offset, info.nbytes)
        try:
            return np.frombuffer(data, DTYPES[info.dtype]).reshape(info.shape)
        except ValueError:  # without entries, and a dimension of 2^60 all the same
            invalid(f"a tensor of shape {list(info.shape)} cannot be read", name)

    def read_values(self, name: str) -> tuple[NDArray[Any], ValueDtype]:
        """Floats in their carrier, and their dtype; float64 is rounded to float32.

        Raises:
            AdapterFileError: missing, or of another dtype.
        """
        info = self.info(name)
        if info.dtype == "F64":
            with np.errstate(over="ignore"):  # infinite is refused where a delta is made
                return self.read(name).astype("<f4"), "F32"
        if info.dtype not in CARRIER:
            invalid(f"values of dtype {info.dtype}; they must be floats", name)
        return self.read(name), info.dtype

    def read_f32(self, name: str) -> NDArray[np.float32]:
        """Floats, widened (float64: rounded) to float32; a new array.

        Raises:
            AdapterFileError: missing, or of another dtype.
        """
        values, dtype = self.read_values(name)
        return from_carrier(values, dtype)

    def read_positions(self, name: str) -> NDArray[np.int64]:
        """Integers as int64; whole floats too, as some writers made them of integers.

        Raises:
            AdapterFileError: missing, of another dtype, or not whole.
        """
        info = self.info(name)
        found = self.read(name)
        if info.dtype in INTEGERS:
            return found.astype(np.int64)
        if info.dtype not in ("F32", "F64"):
            invalid(f"positions of dtype {info.dtype}; they must be integers", name)
        # Beyond 2^24 a float32 cannot tell neighbours apart: such positions are not to be trusted.
        most = 2**24 if info.dtype == "F32" else 2**53
        if not (np.isfinite(found).all() and (np.abs(found) <= most).all()):
            invalid(f"positions of dtype {info.dtype} beyond {most} are not exact", name)
        whole = found.astype(np.int64)
        if (whole != found).any():
            invalid("a position is not a whole number", name)
        return whole


@contextmanager
def open_tensors(readable: Readable) -> Iterator[TensorFile]:
    """A foreign safetensors file, its header checked whole.

    Raises:
        AdapterFileError: malformed, or another format.
        OSError: the path cannot be read.
    """
    with open_source(readable) as source:
        container = parse_container(source, FOREIGN)
        yield TensorFile(container.metadata, container.tensors, source)
