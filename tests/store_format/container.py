"""Builds packed files by hand, independently of the writer, so that tests can break any rule."""

from __future__ import annotations

import json
import struct
from collections.abc import Sequence
from typing import Any

import numpy as np
import zstandard

Tensor = tuple[str, str, list[int], bytes]
"""Name, dtype, shape, bytes."""


def framed(header: bytes, data: bytes = b"") -> bytes:
    """A length prefix, a header and data."""
    return struct.pack("<Q", len(header)) + header + data


def container(
    metadata: dict[str, str] | None, tensors: Sequence[Tensor] = (), trailing: bytes = b""
) -> bytes:
    """A safetensors file with these metadata strings and tensors, laid out in order."""
    header: dict[str, Any] = {} if metadata is None else {"__metadata__": metadata}
    end = 0
    for name, dtype, shape, data in tensors:
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [end, end + len(data)]}
        end += len(data)
    body = b"".join(tensor[3] for tensor in tensors)
    return framed(json.dumps(header).encode(), body + trailing)


def metadata(groups: Any, fingerprint: str = "", **more: str) -> dict[str, str]:
    """The metadata of a packed adapter; `groups` is JSON-encoded unless it is a string already."""
    strings = {
        "gossamer.format": "1",
        "gossamer.base_fingerprint": fingerprint,
        "gossamer.base_name": "test",
        "gossamer.groups": groups if isinstance(groups, str) else json.dumps(groups),
    }
    return strings | {f"gossamer.{key}": text for key, text in more.items()}


def group(*modules: dict[str, Any], **changes: Any) -> dict[str, Any]:
    """A raw element group of bfloat16 values, with `changes`."""
    row: dict[str, Any] = {
        "kind": "element",
        "block_size": 1,
        "dtype": "BF16",
        "positions": "raw",
        "values": "raw",
        "modules": list(modules),
    }
    return row | changes


def module(name: str, shape: Sequence[int], nnz: int, **more: Any) -> dict[str, Any]:
    return {"name": name, "shape": list(shape), "nnz": nnz, **more}


def positions(name: str, numbers: Sequence[int], dtype: str = "I64") -> Tensor:
    carrier = {"I64": "<i8", "I32": "<i4", "F32": "<f4"}[dtype]
    return (f"{name}.positions", dtype, [len(numbers)], np.array(numbers, carrier).tobytes())


def bf16(name: str, bits: Sequence[int]) -> Tensor:
    return (f"{name}.values", "BF16", [len(bits)], np.array(bits, "<u2").tobytes())


def frame(name: str, data: bytes) -> Tensor:
    return (name, "U8", [len(data)], data)


def squeezed(data: bytes, *, checksum: bool = True, content_size: bool = True) -> bytes:
    """One zstandard frame as the format wants it, unless told otherwise."""
    compressor = zstandard.ZstdCompressor(write_checksum=checksum, write_content_size=content_size)
    return compressor.compress(data)
