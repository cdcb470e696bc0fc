"""Reads the instructions of a pickle, as far as data takes them (`gossamer.base.unpickle`)."""

from __future__ import annotations

import struct
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

from gossamer.base.pickled import Budget, Storage, Symbol, Unbuilt, build, call, dtype_of, symbol
from gossamer.store.errors import AdapterFileError
from gossamer.store.format.container import invalid

#: key, dtype and items → the storage.
GetStorage = Callable[[str, str, int], Storage]
#: Lists, dicts, tuples, tensors, and as many that are remembered: torch makes some thirty of each
#: tensor.
MAX_OBJECTS = 1_000_000
_MAX_MARKS = 1000
_MAX_KEY = 2**31


class Machine:
    """A stack, a memory, and one instruction after another.

    Nothing that a program says is called or looked up; what it may say is in `_INSTRUCTIONS`, at
    the end.

    Args:
        program: the pickle.
        storage: the bytes that it refers to.
        budget: how much may be copied.
    """

    def __init__(self, program: bytes, storage: GetStorage, budget: Budget) -> None:
        self._program = program
        self._at = 0
        self._storage = storage
        self._budget = budget
        self._stack: list[Any] = []
        self._below: list[list[Any]] = []
        self._memo: dict[int, Any] = {}
        self._objects = 0
        self._done = False

    def run(self) -> Any:
        """What the program leaves on its stack.

        Raises:
            AdapterFileError: `unsupported_file` for an instruction or a name that data does not
                take, `invalid_adapter_file` for a program that makes no sense.
        """
        try:
            while not self._done:
                code = self._program[self._at]
                self._at += 1
                instruction = self._INSTRUCTIONS.get(code)
                if instruction is None:
                    raise AdapterFileError(
                        "unsupported_file",
                        f"the pickle's instruction {bytes([code])!r} at {self._at - 1} is not one "
                        "that data takes; nothing of it has been run",
                    )
                instruction(self)
            return self._stack.pop()
        except (LookupError, TypeError, ValueError, OverflowError, struct.error) as error:
            raise AdapterFileError(
                "invalid_adapter_file", f"the pickle makes no sense at byte {self._at}"
            ) from error

    def _take(self, length: int) -> bytes:
        data = self._program[self._at : self._at + length]
        if len(data) != length:
            invalid("the pickle ends early")
        self._at += length
        return data

    def _number(self, form: str) -> Any:
        (value,) = struct.unpack(form, self._take(struct.calcsize(form)))
        return value

    def _line(self) -> str:
        end = self._program.index(b"\n", self._at)
        line = self._take(end - self._at + 1)
        return line[:-1].decode("utf-8")

    def _push(self, value: Any) -> None:
        self._stack.append(value)

    def _make(self, value: Any) -> None:
        self._objects += 1
        if self._objects > MAX_OBJECTS:
            raise AdapterFileError(
                "adapter_too_large", f"the pickle makes more than {MAX_OBJECTS} objects"
            )
        self._stack.append(value)

    def _text(self, form: str) -> None:
        self._push(self._take(self._number(form)).decode("utf-8", "surrogatepass"))

    def _bytes(self, form: str) -> None:
        self._push(self._take(self._number(form)))

    def _long(self) -> None:
        self._push(int.from_bytes(self._take(self._number("B")), "little", signed=True))

    def _mark(self) -> None:
        if len(self._below) == _MAX_MARKS:
            invalid(f"the pickle is nested more than {_MAX_MARKS} deep")
        self._below.append(self._stack)
        self._stack = []

    def _marked(self) -> list[Any]:
        items, self._stack = self._stack, self._below.pop()
        return items

    def _tuple(self, count: int) -> None:
        if len(self._stack) < count:
            invalid("the pickle makes a tuple of more than there is")
        items = tuple(self._stack[-count:])
        del self._stack[-count:]
        self._make(items)

    def _append(self, items: list[Any]) -> None:
        target = self._stack[-1]
        if not isinstance(target, list):
            invalid("the pickle appends to what is no list")
        target.extend(items)

    def _set(self, items: list[Any]) -> None:
        target = self._stack[-1]
        if not isinstance(target, dict) or len(items) % 2:
            invalid("the pickle sets items of what is no dict")
        for key, value in zip(items[::2], items[1::2], strict=True):
            # No tuple: to hash one that is nested a million deep ends the process. No large
            # integer: those that differ by 2^61 - 1 have one hash, and each new one would be
            # compared with all the others.
            if not isinstance(key, str) and not (isinstance(key, int) and abs(key) < _MAX_KEY):
                invalid("a key of a dict is neither a string nor an integer of 32 bits")
            target[key] = value

    def _pair(self) -> list[Any]:
        value, key = self._stack.pop(), self._stack.pop()
        return [key, value]

    def _remember(self, number: int) -> None:
        if len(self._memo) == MAX_OBJECTS:
            raise AdapterFileError(
                "adapter_too_large", f"the pickle remembers more than {MAX_OBJECTS} objects"
            )
        value = self._memo[number] = self._stack[-1]
        if isinstance(value, Unbuilt):
            value.memo.add(number)

    def _recall(self, number: int) -> None:
        self._push(self._memo[number])

    def _global(self, module: Any, name: Any) -> None:
        if not isinstance(module, str) or not isinstance(name, str):
            invalid("the pickle asks for something without a name")
        self._make(symbol(module, name))

    def _stack_global(self) -> None:
        name, module = self._stack.pop(), self._stack.pop()
        self._global(module, name)

    def _reduce(self) -> None:
        arguments, function = self._stack.pop(), self._stack.pop()
        self._make(call(function, arguments, self._budget))

    def _build(self) -> None:
        state, unbuilt = self._stack.pop(), self._stack.pop()
        built = build(unbuilt, state, self._budget)
        for number in unbuilt.memo:
            if self._memo[number] is unbuilt:  # the number may be another object's by now
                self._memo[number] = built
        unbuilt.memo.clear()  # else each of many builds of one object would go through all of it
        self._make(built)

    def _persistent(self) -> None:
        match self._stack.pop():
            case ("storage", Symbol() as kind, str(key), str(), int(items)):
                self._make(self._storage(key, dtype_of(kind), items))
            case _:
                invalid("the pickle refers to something that is no storage")

    def _stop(self) -> None:
        self._done = True

    _INSTRUCTIONS: ClassVar[Mapping[int, Callable[[Machine], None]]] = {
        ord(code): instruction
        for code, instruction in {
            "\x80": lambda self: self._take(1),  # the protocol, of whichever these instructions are
            "\x95": lambda self: self._take(8),  # a frame
            ".": lambda self: self._stop(),
            "N": lambda self: self._push(None),
            "\x88": lambda self: self._push(True),
            "\x89": lambda self: self._push(False),
            "J": lambda self: self._push(self._number("<i")),
            "K": lambda self: self._push(self._number("B")),
            "M": lambda self: self._push(self._number("<H")),
            "\x8a": lambda self: self._long(),
            "G": lambda self: self._push(self._number(">d")),
            "X": lambda self: self._text("<I"),
            "\x8c": lambda self: self._text("B"),
            "\x8d": lambda self: self._text("<Q"),
            "B": lambda self: self._bytes("<I"),
            "C": lambda self: self._bytes("B"),
            "\x8e": lambda self: self._bytes("<Q"),
            "(": lambda self: self._mark(),
            ")": lambda self: self._push(()),
            "\x85": lambda self: self._tuple(1),
            "\x86": lambda self: self._tuple(2),
            "\x87": lambda self: self._tuple(3),
            "t": lambda self: self._make(tuple(self._marked())),
            "]": lambda self: self._make([]),
            "a": lambda self: self._append([self._stack.pop()]),
            "e": lambda self: self._append(self._marked()),
            "}": lambda self: self._make({}),
            "s": lambda self: self._set(self._pair()),
            "u": lambda self: self._set(self._marked()),
            "q": lambda self: self._remember(self._number("B")),
            "r": lambda self: self._remember(self._number("<I")),
            "\x94": lambda self: self._remember(len(self._memo)),
            "h": lambda self: self._recall(self._number("B")),
            "j": lambda self: self._recall(self._number("<I")),
            "c": lambda self: self._global(self._line(), self._line()),
            "\x93": lambda self: self._stack_global(),
            "R": lambda self: self._reduce(),
            "b": lambda self: self._build(),
            "Q": lambda self: self._persistent(),
        }.items()
    }
