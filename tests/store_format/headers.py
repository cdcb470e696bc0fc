"""Headers that break the container's rules, and headers meant to exhaust the parser."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from typing import Any

from tests.store_format.container import container, framed, metadata

MIB = 1 << 20
_META = metadata([])


def malformed() -> Iterator[tuple[str, bytes]]:
    """Files whose header must be refused, by what is wrong."""
    yield "nothing", b""
    yield "seven bytes", b"\x02\0\0\0\0\0\0"
    yield "only a length", struct.pack("<Q", 2)
    yield "length 2^64 - 1", struct.pack("<Q", 2**64 - 1) + b"{}"
    yield "length beyond the file", struct.pack("<Q", 100) + b"{}"
    yield "length over the limit", framed(b"{" + b" " * MIB + b"}")
    yield "no JSON", framed(b"{nonsense}")
    yield "cut short", framed(b'{"a":{"dtype":"U8","shape":[0],"data_off')
    yield "a list", framed(b"[]")
    yield "two objects", framed(b"{}{}")
    yield "not UTF-8", framed(b'{"\xff":1}')
    yield "a byte order mark", framed(b"\xef\xbb\xbf{}")
    yield "half a surrogate pair", framed(b'{"__metadata__":{"\\ud800":"x"}}')
    yield "NaN", framed(b'{"a":NaN}')
    yield "1e999", framed(b'{"a":1e999}')
    yield "duplicate tensor", framed(_twice("a"), b"")
    yield "duplicate metadata", framed(b'{"__metadata__":{},"__metadata__":{}}')
    yield (
        "duplicate dtype",
        framed(b'{"a":{"dtype":"U8","dtype":"U8","shape":[0],"data_offsets":[0,0]}}'),
    )
    yield "metadata of a number", framed(b'{"__metadata__":{"gossamer.format":1}}')
    yield "metadata a list", framed(b'{"__metadata__":[]}')
    yield "bytes after the last tensor", container(_META, [("a", "U8", [1], b"1")], trailing=b"2")
    rows: dict[str, dict[str, Any]] = {
        "dtype F64": {"dtype": "F64", "shape": [1], "data_offsets": [0, 8]},
        "dtype a list": {"dtype": ["U8"], "shape": [8], "data_offsets": [0, 8]},
        "no dtype": {"shape": [8], "data_offsets": [0, 8]},
        "a further field": {"dtype": "U8", "shape": [8], "data_offsets": [0, 8], "x": 1},
        "shape a number": {"dtype": "U8", "shape": 8, "data_offsets": [0, 8]},
        "shape of floats": {"dtype": "U8", "shape": [8.0], "data_offsets": [0, 8]},
        "shape of booleans": {"dtype": "U8", "shape": [True, 8], "data_offsets": [0, 8]},
        "shape negative": {"dtype": "U8", "shape": [-8, -1], "data_offsets": [0, 8]},
        "shape of four": {"dtype": "U8", "shape": [1, 1, 1, 8], "data_offsets": [0, 8]},
        "shape larger than the bytes": {"dtype": "U8", "shape": [9], "data_offsets": [0, 8]},
        "shape 2^62 × 2^62": {"dtype": "U8", "shape": [2**62, 2**62], "data_offsets": [0, 8]},
        "shape that overflows to 8": {
            "dtype": "U8",
            "shape": [2**61 + 1, 8],
            "data_offsets": [0, 8],
        },
        "offsets of one": {"dtype": "U8", "shape": [8], "data_offsets": [0]},
        "offsets in reverse": {"dtype": "U8", "shape": [8], "data_offsets": [8, 0]},
        "offsets negative": {"dtype": "U8", "shape": [8], "data_offsets": [-8, 0]},
        "offsets beyond the file": {"dtype": "U8", "shape": [16], "data_offsets": [0, 16]},
        "offsets of text": {"dtype": "U8", "shape": [8], "data_offsets": ["0", "8"]},
        "a hole before": {"dtype": "U8", "shape": [7], "data_offsets": [1, 8]},
    }
    for label, row in rows.items():
        header = {"__metadata__": _META, "a": row}
        yield f"tensor: {label}", framed(json.dumps(header).encode(), bytes(8))
    whole = {"dtype": "U8", "shape": [8], "data_offsets": [0, 8]}
    both = {"__metadata__": _META, "a": whole, "b": whole}
    yield "tensor: two over the same bytes", framed(json.dumps(both).encode(), bytes(8))


def _twice(name: str) -> bytes:
    row = f'"{name}":{{"dtype":"U8","shape":[0],"data_offsets":[0,0]}}'
    return f"{{{row},{row}}}".encode()


def bombs() -> Iterator[tuple[str, bytes]]:
    """Headers of up to a megabyte that cost a naive parser time or memory."""

    def filled(unit: bytes, opening: bytes = b'{"a":[', closing: bytes = b"]}") -> bytes:
        room = MIB - len(opening) - len(closing)
        body = (unit * (room // len(unit) + 1))[: room - room % len(unit)]
        return framed(opening + body.rstrip(b",") + closing)

    yield "nested lists", filled(b"[", closing=b"")
    yield "nested objects", filled(b'{"a":', b"", b"")
    yield "empty objects", filled(b"{},")
    yield "empty lists", filled(b"[],")
    yield "integers", filled(b"7,")
    yield "floats", filled(b".5e1,".replace(b".", b"1."))
    yield "a number of a megabyte", framed(b'{"a":' + b"9" * (MIB - 10) + b"}")
    yield "a float of a megabyte", framed(b'{"a":0.' + b"9" * (MIB - 10) + b"}")
    yield "a string of a megabyte", framed(b'{"a":"' + b"x" * (MIB - 10) + b'"}')
    yield "escapes", framed(b'{"a":"' + b"\\u0041" * ((MIB - 10) // 6) + b'"}')
    rows = (f'"{i}":{{"dtype":"U8","shape":[0],"data_offsets":[0,0]}}' for i in range(4000))
    many = json.dumps({"__metadata__": _META})[:-1] + "," + ",".join(rows) + "}"
    yield "thousands of empty tensors", framed(many.encode())
    rows = (f'"{i}":{{"dtype":"U8","shape":[0],"data_offsets":[0,0]}}' for i in range(18000))
    yield "more empty tensors than allowed", framed(("{" + ",".join(rows) + "}").encode())
    rows = (f'"{i}":{{"dtype":"U8","shape":[0],"data_offsets":[0,0]}}' for i in range(4097))
    yield "one tensor too many", framed(("{" + ",".join(rows) + "}").encode())
    keys = ",".join(f'"{i}":0' for i in range(60000))
    yield "keys, the last one twice", framed(("{" + keys + ',"59999":0}').encode())
    names = ",".join(f'{{"name":"w{i:05}","shape":[1,1],"nnz":0}}' for i in range(4090))
    row = '{"kind":"element","block_size":1,"dtype":"BF16","positions":"raw","values":"raw"'
    last = '{"name":"w04089","shape":[1,1],"nnz":0}'
    text = f'[{row},"modules":[{names}]}},{row},"modules":[{last}]}}]'
    yield "thousands of modules, the last one twice", container(metadata(text))
    more = ",".join(f'{{"name":"x{i:05}","shape":[1,1],"nnz":0}}' for i in range(10))
    text = f'[{row},"modules":[{names},{more}]}}]'
    yield "more modules than allowed", container(metadata(text))
    yield "nesting inside the groups", container(metadata("[" * (MIB // 2)))
    yield "spaces", framed(b'{"a":0' + b" " * (MIB - 7) + b"}")
