"""The few names that a pickle of tensors may mention, and what they mean here."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NoReturn

import numpy as np
from numpy.typing import NDArray

from gossamer.store.errors import AdapterFileError, printable
from gossamer.store.exchange.pickles import PickledSparse, PickledTensor
from gossamer.store.exchange.tensors import DTYPES, INTEGERS

_MAX_DIMENSIONS = 8
#: Of a storage, by the type that torch names.
_STORAGES: Mapping[str, str] = {
    "torch BoolStorage": "BOOL",
    "torch ByteStorage": "U8",
    "torch CharStorage": "I8",
    "torch ShortStorage": "I16",
    "torch IntStorage": "I32",
    "torch LongStorage": "I64",
    "torch HalfStorage": "F16",
    "torch BFloat16Storage": "BF16",
    "torch FloatStorage": "F32",
    "torch DoubleStorage": "F64",
}
#: numpy's codes of dtypes, in a pickle.
_CODES: Mapping[str, str] = {
    "b1": "BOOL",
    "u1": "U8",
    "i1": "I8",
    "u2": "U16",
    "i2": "I16",
    "u4": "U32",
    "i4": "I32",
    "u8": "U64",
    "i8": "I64",
    "f2": "F16",
    "f4": "F32",
    "f8": "F64",
}
_ATOMS = (str, bytes, int, float, bool, type(None), PickledTensor, PickledSparse)


def _refuse(message: str) -> NoReturn:
    raise AdapterFileError("invalid_adapter_file", message)


class Budget:
    """How much may be copied while a file is read: as much as it has bytes."""

    def __init__(self, size: int) -> None:
        self._left = size

    def spend(self, size: int) -> None:
        """Take some bytes.

        Raises:
            AdapterFileError: there are not as many left.
        """
        self._left -= size
        if self._left < 0:
            raise AdapterFileError(
                "adapter_too_large", "the pickle makes more data than the file has bytes"
            )


@dataclass(frozen=True)
class Symbol:
    """A name that a pickle mentions: module and name, with a space between them."""

    name: str


@dataclass(eq=False)
class Unbuilt:
    """A numpy array or dtype of which the pickle has yet to say what it holds.

    Attributes:
        code: of a dtype; None: an array.
        memo: under which numbers the pickle has remembered it since it was last built.
    """

    code: str | None
    memo: set[int] = field(default_factory=set)


@dataclass(frozen=True)
class _Dtype:
    name: str


@dataclass(frozen=True)
class _Layout:
    name: str


@dataclass(frozen=True, eq=False)
class Storage:
    """The bytes of one or more tensors."""

    key: str
    dtype: str
    items: NDArray[Any]

    @classmethod
    def of(cls, key: str, dtype: str, data: bytes) -> Storage:
        """Whole items of a dtype.

        Raises:
            AdapterFileError: the bytes are not.
        """
        if len(data) % DTYPES[dtype].itemsize:
            _refuse(f"the storage {printable(key)} is cut: {len(data)} bytes of {dtype}")
        return cls(key, dtype, np.frombuffer(data, DTYPES[dtype]))

    def checked(self, dtype: str, items: int) -> Storage:
        """Itself, where it is what the pickle says.

        Raises:
            AdapterFileError: of another dtype or size.
        """
        if dtype != self.dtype or items != self.items.size:
            _refuse(
                f"the storage {printable(self.key)} has {self.items.size} items of {self.dtype}, "
                f"not {printable(str(items))} of {dtype}"
            )
        return self


def dtype_of(symbol: Any) -> str:
    """The dtype of a storage's type.

    Raises:
        AdapterFileError: it is no such type.
    """
    if not isinstance(symbol, Symbol) or symbol.name not in _STORAGES:
        _refuse("a storage is of no known type")
    return _STORAGES[symbol.name]


def symbol(module: str, name: str) -> Symbol:
    """What a name means.

    Raises:
        AdapterFileError: `unsupported_file`, it is none of those that data takes.
    """
    full = f"{module} {name}"
    if full not in MEANINGS and full not in _STORAGES and full != "numpy ndarray":
        raise AdapterFileError(
            "unsupported_file",
            f"the pickle asks for {printable(module)}.{printable(name)}, which is no data; "
            "nothing of it has been run",
        )
    return Symbol(full)


def call(symbol: Any, arguments: Any, budget: Budget) -> Any:
    """What a name makes of its arguments.

    Raises:
        AdapterFileError: they do not fit.
    """
    if not isinstance(symbol, Symbol) or symbol.name not in MEANINGS:
        _refuse("the pickle calls what cannot be called")
    if not isinstance(arguments, tuple):
        _refuse("the pickle calls without arguments")
    return MEANINGS[symbol.name](arguments, budget)


def build(unbuilt: Any, state: Any, budget: Budget) -> PickledTensor | _Dtype:
    """A numpy array or dtype with its state.

    Raises:
        AdapterFileError: it is something else, or the state does not fit.
    """
    match unbuilt, state:
        case Unbuilt(code=str(code)), (int(), "<" | "|" | "=", *_):
            return _Dtype(_CODES[code])
        case Unbuilt(code=None), (int(), tuple(shape), _Dtype(name), bool(fortran), bytes(data)):
            return _array(_sizes(shape), name, data, budget, fortran=fortran)
    _refuse("the pickle builds what is no numpy array or dtype")


def plain(found: Any) -> Any:
    """Itself, where nothing but data is in it.

    Raises:
        AdapterFileError: something is left that is part of a tensor, but none.
    """
    seen: set[int] = set()
    waiting: list[Any] = [[found]]
    while waiting:
        container = waiting.pop()
        if id(container) in seen:
            continue
        seen.add(id(container))
        for one in container.values() if isinstance(container, dict) else container:
            if isinstance(one, dict | list | tuple):
                waiting.append(one)
            elif not isinstance(one, _ATOMS):
                _refuse("the pickle holds something that is no data")
    return found


def _array(
    shape: tuple[int, ...], dtype: str, data: bytes, budget: Budget, *, fortran: bool
) -> PickledTensor:
    if math.prod(shape) * DTYPES[dtype].itemsize != len(data):
        _refuse(f"{len(data)} bytes do not hold {dtype} of shape {shape}")
    items = np.frombuffer(data, DTYPES[dtype])
    array = items.reshape(shape, order="F" if fortran else "C")
    return PickledTensor(dtype, _contiguous(array, budget))


def _contiguous(array: NDArray[Any], budget: Budget) -> NDArray[Any]:
    if not array.flags.c_contiguous:
        budget.spend(array.nbytes)
    return array if array.flags.c_contiguous else np.ascontiguousarray(array)


def _sizes(found: Any) -> tuple[int, ...]:
    if (
        not isinstance(found, tuple)
        or len(found) > _MAX_DIMENSIONS
        or not all(type(one) is int and 0 <= one < 2**62 for one in found)
    ):
        _refuse(f"a size or stride is no tuple of at most {_MAX_DIMENSIONS} integers")
    return found


def _tensor(arguments: tuple[Any, ...], budget: Budget) -> PickledTensor:
    """storage, offset, size, strides (both in items), and what concerns gradients."""
    storage, offset = arguments[:2]
    size, strides = _sizes(arguments[2]), _sizes(arguments[3])
    if not isinstance(storage, Storage) or type(offset) is not int or offset < 0:
        _refuse("a tensor has no storage, or no offset into it")
    if len(size) != len(strides):
        _refuse("a tensor has not as many strides as dimensions")
    count, items = math.prod(size), storage.items
    last = offset + sum((n - 1) * step for n, step in zip(size, strides, strict=True))
    # More entries than its storage has items: one of them would be there many times.
    if count and (last >= items.size or count > items.size):
        _refuse(f"a tensor reaches beyond its storage of {items.size} items")
    if not count:
        return PickledTensor(storage.dtype, np.zeros(_small(size), items.dtype))
    steps = tuple(step * items.itemsize for step in strides)
    view = np.lib.stride_tricks.as_strided(items[offset:], size, steps, writeable=False)
    return PickledTensor(storage.dtype, _contiguous(view, budget))


def _small(size: tuple[int, ...]) -> tuple[int, ...]:
    """The size of a tensor without entries, which numpy wants to be addressable all the same."""
    if math.prod(n for n in size if n) > 2**40:
        _refuse("a tensor without entries has a huge size")
    return size


def _sparse(arguments: tuple[Any, ...], _: Budget) -> PickledSparse:
    match arguments:
        case (
            _Layout("torch.sparse_coo"),
            (PickledTensor() as indices, PickledTensor() as values, tuple(size), *_),
        ):
            shape = _sizes(size)
            count = (*values.array.shape, 0)[0]
            fits = indices.array.shape == (len(shape), count) and values.array.ndim == 1
            if fits and indices.dtype in INTEGERS:
                return PickledSparse(shape, indices, values)
    _refuse("a sparse tensor has no coordinates that fit its values")


def _encoded(arguments: tuple[Any, ...], budget: Budget) -> bytes:
    """How bytes are written where only text can be."""
    match arguments:
        case str(text), "latin1":
            budget.spend(len(text))
            return text.encode("latin1")
    _refuse("the pickle encodes what is no text of bytes")


def _dtype(arguments: tuple[Any, ...], _: Budget) -> Unbuilt:
    code = arguments[0]
    if not isinstance(code, str) or code not in _CODES:
        # What is no text is not shown: of forty lists, each twice in the next, it has terabytes.
        named = printable(code) if isinstance(code, str) else "of another type"
        _refuse(f"numpy's dtype {named} is none of numbers")
    return Unbuilt(code)


def _scalar(arguments: tuple[Any, ...], budget: Budget) -> Any:
    match arguments:
        case (_Dtype(name), bytes(data)):
            found = _array((), name, data, budget, fortran=False).array.item()
            return bool(found) if name == "BOOL" else found
    _refuse("a number of numpy's has no dtype or no bytes")


def _first(kind: type, arguments: tuple[Any, ...]) -> Any:
    if not arguments or not isinstance(arguments[0], kind):
        _refuse("the pickle calls with arguments of another type")
    return arguments[0]


def _empty(make: Callable[[], Any], arguments: tuple[Any, ...]) -> Any:
    if arguments:
        _refuse("the pickle makes something that should be empty, and is not")
    return make()


Meaning = Callable[[tuple[Any, ...], Budget], Any]
#: A tensor's and an array's parts. Nothing here does more than to look at its arguments.
MEANINGS: Mapping[str, Meaning] = {
    "collections OrderedDict": lambda arguments, _: _empty(dict, arguments),
    "__builtin__ bytes": lambda arguments, _: _empty(bytes, arguments),
    "builtins bytes": lambda arguments, _: _empty(bytes, arguments),
    "_codecs encode": _encoded,
    "torch Size": lambda arguments, _: _sizes(_first(tuple, arguments)),
    "torch._utils _rebuild_tensor_v2": _tensor,
    "torch._utils _rebuild_parameter": lambda arguments, _: _first(PickledTensor, arguments),
    "torch._utils _rebuild_sparse_tensor": _sparse,
    "torch.serialization _get_layout": lambda arguments, _: _Layout(_first(str, arguments)),
    "numpy dtype": _dtype,
    "numpy.core.multiarray _reconstruct": lambda *_: Unbuilt(None),
    "numpy._core.multiarray _reconstruct": lambda *_: Unbuilt(None),
    "numpy.core.multiarray scalar": _scalar,
    "numpy._core.multiarray scalar": _scalar,
}
