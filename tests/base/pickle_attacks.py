"""Hostile files of `torch.save`; unpickled by Python or by a careless reader, some do harm.

Each must be refused; `CANARY` must never come to exist.
"""

from __future__ import annotations

import io
import os
import pickle
import struct
import tarfile
import tempfile
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from gossamer.store.errors import RefusalCode

CANARY = Path(tempfile.gettempdir()) / f"gossamer-pickle-canary-{os.getpid()}"
UNSUPPORTED: RefusalCode = "unsupported_file"
INVALID: RefusalCode = "invalid_adapter_file"
TOO_LARGE: RefusalCode = "adapter_too_large"
FLOATS = b"ctorch\nFloatStorage\n"
REBUILD = b"ctorch._utils\n_rebuild_tensor_v2\n"
MULTIARRAY = b"cnumpy.core.multiarray\n"


class Attack(NamedTuple):
    name: str
    data: bytes
    code: RefusalCode


class Calls:
    """Unpickled, it would call `function`."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.what = function, arguments

    def __reduce__(self) -> tuple[Any, tuple[Any, ...]]:
        return self.what


class HasState:
    """Unpickled, it would set attributes that the pickle chooses."""


def archive(
    program: bytes,
    storages: Mapping[str, bytes] | None = None,
    *,
    compression: int = zipfile.ZIP_STORED,
    more: Mapping[str, bytes] | None = None,
) -> bytes:
    """As torch writes it."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", compression) as file:
        file.writestr("archive/data.pkl", program)
        file.writestr("archive/byteorder", b"little")
        for key, data in (storages or {}).items():
            file.writestr(f"archive/data/{key}", data)
        file.writestr("archive/version", b"3\n")
        for name, data in (more or {}).items():
            file.writestr(name, data)
    return buffer.getvalue()


def text(value: str) -> bytes:
    encoded = value.encode()
    return b"X" + struct.pack("<I", len(encoded)) + encoded


def number(value: int) -> bytes:
    return b"\x8a\x08" + value.to_bytes(8, "little", signed=True)


def numbers(*values: int) -> bytes:
    """A tuple."""
    return b"(" + b"".join(map(number, values)) + b"t"


def storage(items: int, key: str = "0", kind: bytes = FLOATS) -> bytes:
    return b"(" + text("storage") + kind + text(key) + text("cpu") + number(items) + b"tQ"


def tensor(offset: int, size: tuple[int, ...], strides: tuple[int, ...], items: int = 4) -> bytes:
    """A program that makes a tensor of the storage 0."""
    parts = storage(items) + number(offset) + numbers(*size) + numbers(*strides)
    return b"\x80\x02" + REBUILD + b"(" + parts + b"\x89" + b"NtR."


def attacks() -> Iterator[Attack]:
    for name, data in _calls():
        yield Attack(f"call: {name}", archive(data), UNSUPPORTED)
    yield from _containers()
    yield from _programs()
    yield from _bombs()
    yield from _tensors()
    yield from _arrays()


def _calls() -> Iterator[tuple[str, bytes]]:
    """What runs something when Python opens it."""
    touch = f"import os; os.mkdir({str(CANARY)!r})"
    for protocol in (0, 1, 2, 3, 4, 5):
        yield f"os.mkdir, protocol {protocol}", pickle.dumps(Calls(os.mkdir, str(CANARY)), protocol)
    yield "os.system", pickle.dumps(Calls(os.system, f"mkdir {CANARY}"), 2)
    for function in (eval, exec):
        yield f"builtins.{function.__name__}", pickle.dumps(Calls(function, touch), 2)
    yield "__import__", b"\x80\x02c__builtin__\n__import__\n" + text("antigravity") + b"\x85R."
    yield "getattr", b"\x80\x02c__builtin__\ngetattr\ncos\nsystem\n" + text("x") + b"\x86R."
    yield "a dotted name", b"\x80\x04" + text("torch") + text("os.system") + b"\x93."
    yield "operator.attrgetter", b"\x80\x02coperator\nattrgetter\n" + text("system") + b"\x85R."
    yield "torch.load", pickle.dumps(Calls(torch.load, str(CANARY)), 2)
    yield "torch.jit.load", pickle.dumps(Calls(torch.jit.load, str(CANARY)), 2)
    yield "numpy.load", pickle.dumps(Calls(np.load, str(CANARY), None, True), 2)
    yield "numpy.fromfile", b"\x80\x02cnumpy\nfromfile\n" + text("/etc/passwd") + b"\x85R."
    yield (
        "bytearray of a terabyte",
        b"\x80\x02c__builtin__\nbytearray\n" + number(2**40) + b"\x85R.",
    )
    yield "torch.Tensor of a terabyte", b"\x80\x02ctorch\nTensor\n" + number(2**40) + b"\x85R."
    yield "attributes of an object", pickle.dumps(HasState(), 2)
    yield "a module of torch", pickle.dumps(torch.nn.Linear(1, 1), 2)
    yield "pathlib", pickle.dumps(Path("/etc/passwd"), 2)
    yield "a class by NEWOBJ", b"\x80\x02ccollections\nOrderedDict\n)\x81."
    yield "an extension code", b"\x80\x02\x82\x01."
    yield "INST", b"(S'mkdir x'\nios\nsystem\n."
    yield "OBJ", b"(cos\nsystem\nX\x01\0\0\0xo."


def _containers() -> Iterator[Attack]:
    """The archive around the pickle."""
    plain = pickle.dumps({"a": 1}, 2)
    yield Attack("a bare pickle", plain, UNSUPPORTED)
    yield Attack(
        "a bare pickle that calls", pickle.dumps(Calls(os.mkdir, str(CANARY))), UNSUPPORTED
    )
    buffer = io.BytesIO()
    torch.save({"a": torch.ones(2)}, buffer, _use_new_zipfile_serialization=False)
    yield Attack("torch's format before 1.6", buffer.getvalue(), UNSUPPORTED)
    tarred = io.BytesIO()
    with tarfile.open(fileobj=tarred, mode="w") as tar:
        for name in ("storages", "tensors", "pickle"):
            tar.addfile(tarfile.TarInfo(name))
    yield Attack("torch's format before 0.4", tarred.getvalue(), UNSUPPORTED)
    yield Attack("nothing", b"", UNSUPPORTED)
    yield Attack("the beginning of an archive", b"PK\x03\x04" + bytes(60), INVALID)
    good = archive(plain)
    yield Attack("half an archive", good[: len(good) // 2], INVALID)
    other = io.BytesIO()
    with zipfile.ZipFile(other, "w") as file:
        file.writestr("weights.npy", b"x")
    yield Attack("an archive of other things", other.getvalue(), UNSUPPORTED)
    more = {"archive/constants.pkl": plain}
    yield Attack("TorchScript", archive(plain, more=more), UNSUPPORTED)
    code = {"archive/code/__torch__.py": b"def f(): pass"}
    yield Attack("TorchScript's code", archive(plain, more=code), UNSUPPORTED)
    yield Attack("two programs", archive(plain, more={"b/data.pkl": plain}), UNSUPPORTED)
    big = io.BytesIO()
    with zipfile.ZipFile(big, "w") as file:
        file.writestr("archive/data.pkl", plain)
        file.writestr("archive/byteorder", b"big")
    yield Attack("big-endian", big.getvalue(), UNSUPPORTED)
    squeezed = archive(tensor(0, (4,), (1,)), {"0": bytes(16)}, compression=zipfile.ZIP_DEFLATED)
    yield Attack("compressed", squeezed, INVALID)
    bomb = archive(
        tensor(0, (2**26,), (1,), 2**26), {"0": bytes(2**28)}, compression=zipfile.ZIP_DEFLATED
    )
    yield Attack("a zip bomb", bomb, INVALID)
    yield Attack("an encrypted member", _flagged(good), INVALID)
    yield Attack("a member of another checksum", _patched(good, plain, b"\x80\x02}q\1."), INVALID)
    yield Attack("members on top of each other", _overlapping(), INVALID)
    yield Attack("a table of contents of a gigabyte", _directory(2**30), INVALID)
    yield Attack("a table of contents of five megabytes", _padded_directory(), INVALID)


def _flagged(data: bytes) -> bytes:
    """The bit that says that a member is encrypted, in both of its headers."""
    changed = bytearray(data)
    changed[6] |= 1
    changed[data.index(b"PK\x01\x02") + 8] |= 1
    return bytes(changed)


def _patched(data: bytes, old: bytes, new: bytes) -> bytes:
    return data.replace(old, new + old[len(new) :], 1)


def _overlapping() -> bytes:
    """Sixty members, all of them the same megabyte."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as file:
        file.writestr("archive/data.pkl", b"\x80\x02}.")
        file.writestr("archive/data/0", bytes(1 << 20))
        info = file.infolist()[1]
        for n in range(60):
            twin = zipfile.ZipInfo(f"archive/data/{n + 1}")
            for key in ("header_offset", "file_size", "compress_size", "CRC"):
                setattr(twin, key, getattr(info, key))
            file.filelist.append(twin)
            file.NameToInfo[twin.filename] = twin
    return buffer.getvalue()


def _directory(size: int) -> bytes:
    """An archive that says that its table of contents is so long."""
    good = archive(b"\x80\x02}.")
    at = good.rindex(b"PK\x05\x06")
    return good[: at + 12] + struct.pack("<I", size) + good[at + 16 :]


def _padded_directory() -> bytes:
    """One whose table of contents is so long: of comments."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as file:
        file.writestr("archive/data.pkl", b"\x80\x02}.")
        for n in range(80):
            info = zipfile.ZipInfo(f"archive/data/{n}")
            info.comment = bytes(65000)
            file.writestr(info, b"")
    return buffer.getvalue()


def _programs() -> Iterator[Attack]:
    """Instructions that make no sense, or no data."""
    cases: dict[str, tuple[bytes, RefusalCode]] = {
        "nothing": (b"", INVALID),
        "no end": (b"\x80\x02}", INVALID),
        "an empty stack": (b"\x80\x02.", INVALID),
        "a text that ends early": (b"\x80\x02X\xff\xff\xff\x7fab.", INVALID),
        "bytes that end early": (b"\x80\x04\x8e" + struct.pack("<Q", 2**62) + b"ab.", INVALID),
        "no UTF-8": (b"\x80\x02X\x02\0\0\0\xff\xfe.", INVALID),
        "an unknown memory": (b"\x80\x02j\xff\xff\xff\xff.", INVALID),
        "a tuple of nothing": (b"\x80\x02\x87.", INVALID),
        "items without a dict": (b"\x80\x02](NNu.", INVALID),
        "an odd number of items": (b"\x80\x02}(Nu.", INVALID),
        "an append without a list": (b"\x80\x02}Na.", INVALID),
        "the end of a mark that is none": (b"\x80\x02]e.", INVALID),
        "a list for a key": (b"\x80\x02}]Ns.", INVALID),
        "a tuple for a key": (b"\x80\x02})Ns.", INVALID),
        "an integer of 33 bits for a key": (b"\x80\x02}" + number(2**31) + b"Ns.", INVALID),
        "a float for a key": (b"\x80\x02}G" + bytes(8) + b"Ns.", INVALID),
        "a symbol": (b"\x80\x02" + FLOATS + b".", INVALID),
        "a symbol in a list": (b"\x80\x02]" + FLOATS + b"a.", INVALID),
        "a dtype": (b"\x80\x02cnumpy\ndtype\n" + text("f4") + b"\x85R.", INVALID),
        "an array without a state": (
            b"\x80\x02" + MULTIARRAY + b"_reconstruct\ncnumpy\nndarray\n" + text("x") + b"\x86R.",
            INVALID,
        ),
        "a call of a number": (b"\x80\x02K\x01)R.", INVALID),
        "a call of a storage's type": (b"\x80\x02" + FLOATS + b")R.", INVALID),
        "a call with a list": (b"\x80\x02ccollections\nOrderedDict\n]R.", INVALID),
        "an OrderedDict of something": (
            b"\x80\x02ccollections\nOrderedDict\n" + text("x") + b"\x85R.",
            INVALID,
        ),
        "a state for a dict": (b"\x80\x02}}b.", INVALID),
        "a persistent name": (b"\x80\x02" + text("x") + b"Q.", INVALID),
        "a name of a storage that is missing": (
            b"\x80\x02" + storage(4, key="9") + b".",
            INVALID,
        ),
        "a storage that climbs out": (
            b"\x80\x02" + storage(4, key="../../../../etc/passwd") + b".",
            INVALID,
        ),
        "a storage of a strange type": (
            b"\x80\x02" + storage(4, kind=b"ccollections\nOrderedDict\n") + b".",
            INVALID,
        ),
        "a persistent name in protocol 0": (b"P0\n.", UNSUPPORTED),
    }
    for name, (program, code) in cases.items():
        yield Attack(f"program: {name}", archive(program, {"0": bytes(16)}), code)


def _bombs() -> Iterator[Attack]:
    """Much out of little."""
    many = 1_100_000
    yield Attack("bomb: marks", archive(b"\x80\x02" + b"(" * many + b"."), INVALID)
    nested = b"\x80\x02" + b"]" * many + b"a" * (many - 1) + b"."
    yield Attack("bomb: lists", archive(nested), TOO_LARGE)
    memory = b"\x80\x04N" + b"\x94" * many + b"."
    yield Attack("bomb: memory", archive(memory), TOO_LARGE)
    key = b"\x80\x02}" + b")" + b"\x85" * 900_000 + b"Ns."
    yield Attack("bomb: a nested tuple for a key", archive(key), INVALID)
    doubling = b"\x80\x02]q\0" + b"".join(
        b"](" + b"h" + bytes([n]) + b"h" + bytes([n]) + b"eq" + bytes([n + 1]) for n in range(200)
    )
    yield Attack(
        "bomb: a billion laughs, and a symbol", archive(doubling + FLOATS + b"a."), INVALID
    )
    named = b"cnumpy\ndtype\nh" + bytes([200]) + b"\x85R."
    yield Attack("bomb: a billion laughs for a dtype", archive(doubling + named), INVALID)
    yield from _slow()
    million = text("x" * 1_000_000) + b"q\1"
    encode = b"c_codecs\nencode\nq\2h\1" + text("latin1") + b"\x86q\3R"
    copies = b"\x80\x02]q\0(" + million + encode + b"h\2h\3R" * 5000 + b"e."
    yield Attack("bomb: a text encoded five thousand times", archive(copies), TOO_LARGE)
    strided = tensor(0, (500, 500), (1, 500), 250_000)[2:-1]
    views = b"\x80\x02](" + strided * 500 + b"e."
    data = archive(views, {"0": bytes(1_000_000)})
    yield Attack("bomb: a storage turned five hundred times", data, TOO_LARGE)


def _slow() -> Iterator[Attack]:
    """What takes the square of its length, where it is done as it is said."""
    one_hash = b"".join(
        b"\x8a\x0a" + (n * (2**61 - 1)).to_bytes(10, "little") + b"N" for n in range(100_000)
    )
    yield Attack("bomb: keys of one hash", archive(b"\x80\x02}(" + one_hash + b"u."), INVALID)
    # A dtype that is remembered under 100,000 numbers, and built 30,000 times.
    begun = b"\x80\x02cnumpy\ndtype\n" + text("f4") + b"\x85R"
    remembered = b"".join(b"r" + struct.pack("<I", n) for n in range(100_000))
    order = b"K\3" + text("<")
    again = (b"h\0" + order) * 30_000
    program = begun + remembered + again + b"N" + b"\x87b" * 30_000 + b"."
    yield Attack("bomb: a dtype built many times", archive(program), INVALID)


def _tensors() -> Iterator[Attack]:
    """Views that reach out of their storage of four floats."""
    huge = 2**61
    for name, offset, size, strides in (
        ("too long", 0, (5,), (1,)),
        ("beyond the end", 4, (1,), (1,)),
        ("beyond the end by its strides", 0, (2, 2), (4, 1)),
        ("a negative offset", -1, (4,), (1,)),
        ("a negative stride", 3, (4,), (-1,)),
        ("a negative size", 0, (-4,), (1,)),
        ("an offset beyond 2^60", huge, (1,), (1,)),
        ("a stride beyond 2^60", 0, (2,), (huge,)),
        ("2^61 entries of one item", 0, (huge,), (0,)),
        ("2^61 by 2^61", 0, (huge, huge), (0, 0)),
        ("2^61 by nothing", 0, (huge, 0), (0, 0)),
        ("a thousand entries of one item", 0, (1000,), (0,)),
        ("fewer strides than dimensions", 0, (2, 2), (1,)),
        ("nine dimensions", 0, (1,) * 9, (1,) * 9),
    ):
        data = archive(tensor(offset, size, strides), {"0": bytes(16)})
        yield Attack(f"tensor: {name}", data, INVALID)
    for items, held in ((8, 16), (4, 12), (4, 15), (4, 0)):
        data = archive(tensor(0, (4,), (1,), items), {"0": bytes(held)})
        yield Attack(f"tensor: {items} floats in {held} bytes", data, INVALID)
    twice = b"\x80\x02](" + storage(4) + storage(2, kind=b"ctorch\nDoubleStorage\n") + b"e."
    yield Attack("tensor: one storage of two types", archive(twice, {"0": bytes(16)}), INVALID)
    float_offset = REBUILD + b"(" + storage(4) + b"G" + bytes(8) + numbers(4) + numbers(1)
    data = archive(b"\x80\x02" + float_offset + b"\x89NtR.", {"0": bytes(16)})
    yield Attack("tensor: a float for an offset", data, INVALID)
    few = b"\x80\x02" + REBUILD + b"(" + storage(4) + b"tR."
    yield Attack("tensor: too few arguments", archive(few, {"0": bytes(16)}), INVALID)
    coo = b"ctorch.serialization\n_get_layout\n" + text("torch.sparse_coo") + b"\x85R"
    one = tensor(0, (4,), (1,))[2:-1]
    sparse = b"ctorch._utils\n_rebuild_sparse_tensor\n(" + coo + b"(" + one + one + numbers(4)
    data = archive(b"\x80\x02" + sparse + b"ttR.", {"0": bytes(16)})
    yield Attack("tensor: sparse, with floats for indices", data, INVALID)


def _arrays() -> Iterator[Attack]:
    """numpy's."""
    make = MULTIARRAY + b"_reconstruct\ncnumpy\nndarray\n" + numbers(0) + b"C\1b\x87R"

    def dtype(code: str, order: str = "<") -> bytes:
        state = b"(K\3" + text(order) + b"NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\0t"
        return b"cnumpy\ndtype\n" + text(code) + b"\x89\x88\x87R" + state + b"b"

    def array(size: tuple[int, ...], kind: bytes, data: bytes) -> bytes:
        state = b"(K\1" + numbers(*size) + kind + b"\x89C" + bytes([len(data)]) + data + b"t"
        return b"\x80\x04" + make + state + b"b."

    yield Attack("array: of objects", archive(array((1,), dtype("O8", "|"), b"x" * 8)), INVALID)
    yield Attack("array: of records", archive(array((1,), dtype("V8", "|"), b"x" * 8)), INVALID)
    yield Attack("array: big-endian", archive(array((1,), dtype("f4", ">"), bytes(4))), INVALID)
    yield Attack("array: too few bytes", archive(array((2,), dtype("f4"), bytes(4))), INVALID)
    yield Attack("array: 2^61", archive(array((2**61,), dtype("f4"), bytes(4))), INVALID)
    yield Attack("array: a negative size", archive(array((-1,), dtype("f4"), bytes(4))), INVALID)
    scalar = MULTIARRAY + b"scalar\n" + dtype("f8") + b"C\4" + bytes(4) + b"\x86R."
    yield Attack("array: a number of too few bytes", archive(b"\x80\x04" + scalar), INVALID)
    objects = MULTIARRAY + b"scalar\n" + dtype("O8", "|") + b"C\1x\x86R."
    yield Attack("array: a number that is an object", archive(b"\x80\x04" + objects), INVALID)
