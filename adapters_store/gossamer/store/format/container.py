"""The outer layer of the file: a safetensors container, read with distrust and written plainly.

Our own parser and not the safetensors library: that one accepts duplicate keys, any tensor name
and hundreds of thousands of empty tensors. What is written here opens with it.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NoReturn

from gossamer.store.errors import AdapterFileError
from gossamer.store.format.limits import MAX_HEADER_BYTES, MAX_TENSORS
from gossamer.store.format.source import Source

#: Bytes an item of each dtype that a packed adapter may hold.
ITEM_BYTES = {"U8": 1, "F16": 2, "BF16": 2, "F32": 4, "I32": 4, "I64": 8}
_MAX_DIMENSION = 2**62
#: Objects and lists within each other. Python's own recursion limit is no rule: what one library
#: reads, another may not write any more.
MAX_DEPTH = 64


@dataclass(frozen=True)
class Rules:
    """What a safetensors file may hold.

    Attributes:
        item_bytes: the dtypes, and the bytes of an item of each.
        max_header_bytes: of the header, without its length prefix.
        max_tensors: how many tensors there may be.
        max_dimensions: of a tensor.
    """

    item_bytes: Mapping[str, int]
    max_header_bytes: int
    max_tensors: int
    max_dimensions: int

    @property
    def max_marks(self) -> tuple[tuple[str, int], ...]:
        """How often each mark of JSON may be there.

        An honest header has an object for each tensor and each module, and a few for the groups and
        the record. Counted before parsing, because a megabyte of "{}" costs a parser 70 ms and
        25 MB.
        """
        most = self.max_tensors
        return (("{", 3 * most), ("[", 4 * most), (",", 16 * most))


#: Of the packed adapter.
PACKED = Rules(ITEM_BYTES, MAX_HEADER_BYTES, MAX_TENSORS, max_dimensions=3)

#: What to do with what only a command can read.
CONVERT = "convert it on your own machine with `gossamer adapters import`, then upload the result"
_FOREIGN = (
    (b"PK\x03\x04", "a zip archive or a PyTorch checkpoint"),
    (b"PK\x05\x06", "a zip archive"),
    (b"\x80", "a Python pickle (a PyTorch checkpoint)"),
    (b"\x1f\x8b", "a gzip archive"),
    (b"\x28\xb5\x2f\xfd", "a zstandard archive"),
    (b"\xfd7zXZ", "an xz archive"),
    (b"BZh", "a bzip2 archive"),
    (b"7z\xbc\xaf\x27\x1c", "a 7-zip archive"),
    (b"Rar!", "a rar archive"),
    (b"\x93NUMPY", "a NumPy file"),
    (b"\x89HDF", "an HDF5 file"),
    (b"GGUF", "a GGUF file"),
    (b"(dp", "a Python pickle (a PyTorch checkpoint)"),
)
_TAR_MAGIC_AT = 257


@dataclass(frozen=True)
class TensorInfo:
    """One tensor of the container: where its bytes lie in the file, and how they are meant."""

    dtype: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int


@dataclass(frozen=True)
class Container:
    """The parsed header: the metadata strings and the tensors by name."""

    metadata: Mapping[str, str]
    tensors: Mapping[str, TensorInfo]


def invalid(message: str, tensor: str | None = None) -> NoReturn:
    """Refuse the file as malformed."""
    raise AdapterFileError("invalid_adapter_file", message, tensor=tensor)


def parse_container(source: Source, rules: Rules = PACKED) -> Container:
    """The header of a safetensors file, checked whole; no tensor is read.

    Raises:
        AdapterFileError: `unsupported_file` for another format, `invalid_adapter_file` otherwise.
    """
    if source.size < 8:
        invalid(f"a file of {source.size} bytes is no adapter")
    (length,) = struct.unpack("<Q", source.read_at(0, 8))
    if length > rules.max_header_bytes or source.read_at(0, min(9, source.size))[8:] != b"{":
        _refuse_foreign(source)
        if length > rules.max_header_bytes:
            most = rules.max_header_bytes
            invalid(f"the header claims {length} bytes, at most {most} are allowed")
        invalid("the header does not begin with '{'")
    if 8 + length > source.size:
        invalid(f"the header claims {length} bytes, the file has {source.size - 8}")
    header = parse_json(source.read_at(8, length), "header", rules)  # an object: it begins with "{"
    metadata = _metadata(header.pop("__metadata__", {}))
    if len(header) > rules.max_tensors:
        invalid(f"the file has {len(header)} tensors, at most {rules.max_tensors} are allowed")
    data_offset = 8 + length
    tensors = {name: _tensor(name, row, data_offset, rules) for name, row in header.items()}
    _check_coverage(tensors, data_offset, source.size)
    return Container(metadata, tensors)


def parse_json(text: bytes | str, what: str, rules: Rules = PACKED) -> Any:
    """JSON without its ambiguities: duplicate keys, NaN, infinities and bad Unicode are refused.

    Raises:
        AdapterFileError: it is not such a text; `what` names it.
    """
    try:
        decoded = text if isinstance(text, str) else text.decode("utf-8")
        for mark, limit in rules.max_marks:
            if decoded.count(mark) > limit:
                invalid(f"the {what} holds more than {limit} {mark!r}")
        value = json.loads(
            decoded,
            object_pairs_hook=lambda pairs: _no_duplicates(pairs, what),
            parse_float=lambda digits: _finite(digits, what),
            parse_constant=lambda name: invalid(f"the {what} holds {name}"),
        )
        if "\\ud" in decoded.lower():  # half a surrogate pair cannot be written as UTF-8 again
            render_json(value).encode("utf-8")
        if is_too_deep(value):
            raise RecursionError
    except UnicodeError:
        invalid(f"the {what} is not valid Unicode")
    except RecursionError:
        invalid(f"the {what} is nested too deeply")
    except ValueError as error:  # malformed, or an integer of thousands of digits
        invalid(f"the {what} is not JSON: {error}")
    return value


def is_too_deep(value: Any) -> bool:
    """Whether there are more than `MAX_DEPTH` levels of objects and lists."""
    level = [value]
    for _ in range(MAX_DEPTH + 1):
        containers = [one for one in level if isinstance(one, Mapping | list | tuple)]
        if not containers:
            return False
        level = [
            child
            for one in containers
            for child in (one.values() if isinstance(one, Mapping) else one)
        ]
    return True


def _no_duplicates(pairs: list[tuple[str, Any]], what: str) -> dict[str, Any]:
    seen: dict[str, Any] = {}
    for key, value in pairs:
        if key in seen:
            invalid(f"the {what} holds a key twice", tensor=key)
        seen[key] = value
    return seen


def _finite(digits: str, what: str) -> float:
    value = float(digits)
    if not math.isfinite(value):
        invalid(f"the {what} holds the number {digits[:40]}, which is too large")
    return value


def _metadata(value: Any) -> dict[str, str]:
    if not isinstance(value, dict) or not all(isinstance(text, str) for text in value.values()):
        invalid("__metadata__ must map strings to strings")
    return value


def _tensor(name: str, row: Any, data_offset: int, rules: Rules) -> TensorInfo:
    if not isinstance(row, dict) or row.keys() != {"dtype", "shape", "data_offsets"}:
        invalid("a tensor must have exactly dtype, shape and data_offsets", tensor=name)
    dtype, shape, offsets = row["dtype"], row["shape"], row["data_offsets"]
    if not isinstance(dtype, str) or dtype not in rules.item_bytes:
        known = ", ".join(rules.item_bytes)
        invalid(f"dtype {str(dtype)[:20]!r} is not one of {known}", tensor=name)
    if not is_sizes(shape) or len(shape) > rules.max_dimensions:
        most = rules.max_dimensions
        invalid(f"shape must be at most {most} integers of at least 0", tensor=name)
    if not is_sizes(offsets) or len(offsets) != 2 or offsets[1] < offsets[0]:
        invalid("data_offsets must be two integers in order", tensor=name)
    nbytes = offsets[1] - offsets[0]
    if math.prod(shape) * rules.item_bytes[dtype] != nbytes:
        invalid(f"{nbytes} bytes do not hold {dtype} of shape {shape}", tensor=name)
    return TensorInfo(dtype, tuple(shape), data_offset + offsets[0], nbytes)


def is_sizes(value: Any) -> bool:
    """Whether a JSON value is a list of integers in [0, 2^62]; True and 1.0 are no integers."""
    return isinstance(value, list) and all(
        type(x) is int and 0 <= x <= _MAX_DIMENSION for x in value
    )


def _check_coverage(tensors: Mapping[str, TensorInfo], data_offset: int, size: int) -> None:
    """The tensors cover the data without holes, overlaps or bytes after the last."""
    end = data_offset
    for name, info in sorted(tensors.items(), key=lambda item: (item[1].offset, item[1].nbytes)):
        if info.offset != end:
            invalid("the tensor's bytes overlap others, or leave a hole before them", tensor=name)
        end += info.nbytes
    if end != size:
        invalid(f"the tensors end at byte {end}, the file at {size}")


def _refuse_foreign(source: Source) -> None:
    """Another format, by its first bytes: said so, and never opened."""
    start = source.read_at(0, min(_TAR_MAGIC_AT + 5, source.size))
    found = next((what for magic, what in _FOREIGN if start.startswith(magic)), None)
    if start[_TAR_MAGIC_AT:] == b"ustar":
        found = "a tar archive"
    if found is not None:
        raise AdapterFileError("unsupported_file", f"this is {found}; {CONVERT}")


def refuse_unpacked() -> NoReturn:
    """Refuse a safetensors file that is no packed adapter."""
    raise AdapterFileError(
        "unsupported_file", f"this safetensors file is not a packed adapter; {CONVERT}"
    )


def render_header(
    metadata: Mapping[str, str],
    tensors: Mapping[str, tuple[str, list[int]]],
    rules: Rules = PACKED,
) -> bytes:
    """The length prefix and header for `tensors` (name → dtype, shape), laid out in that order."""
    rows: dict[str, Any] = {"__metadata__": dict(metadata)}
    end = 0
    for name, (dtype, shape) in tensors.items():
        begin, end = end, end + math.prod(shape) * rules.item_bytes[dtype]
        rows[name] = {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}
    text = render_json(rows).encode()
    text += b" " * (-len(text) % 8)  # so that the data, widest items first, is aligned
    return struct.pack("<Q", len(text)) + text


def render_json(value: Any) -> str:
    """JSON in its one compact form.

    Raises:
        ValueError: a number is NaN or infinite.
    """
    return json.dumps(value, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
