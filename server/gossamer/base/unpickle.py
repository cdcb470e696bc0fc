"""Opens a file of `torch.save` without running anything that is in it.

A pickle is a program. Here it is read by an interpreter of the few instructions that data takes,
which calls nothing: the names that a file of tensors may mention are symbols with a fixed meaning
(`pickled.MEANINGS`), and any other name, instruction or type ends the reading. Unlike
`torch.load(weights_only=True)`, whose allowed names can still be asked for a terabyte
(`bytearray(10**12)`), what is made here is bounded by the size of the file.
"""

from __future__ import annotations

import os
import stat
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from gossamer.base.pickle_machine import Machine
from gossamer.base.pickled import Budget, Storage, plain
from gossamer.store.errors import AdapterFileError, printable
from gossamer.store.format.container import invalid

#: Of the file; tensors of it stay in memory until their importer is done.
MAX_BYTES = 16 << 30
#: Of the program in it. composable-sft writes millions of small numbers into it, 2 to 5 bytes each.
MAX_PROGRAM_BYTES = 64 << 20
#: Of the archive's table of contents: some 30,000 members.
_MAX_DIRECTORY_BYTES = 4 << 20
_PROGRAM, _ORDER = "data.pkl", "byteorder"
#: What makes the archive a program of another kind.
_TORCH_SCRIPT = ("constants.pkl", "code/")


def unpickle(path: Path, max_bytes: int = MAX_BYTES) -> Any:
    """The content of a `.pt` or `.bin` file as plain data.

    Dicts (with strings and integers for keys), lists, tuples, strings, bytes, numbers, truth
    values, None, `PickledTensor` and `PickledSparse`. Containers may be shared, or hold themselves:
    walk them no deeper than you know them to be.

    Raises:
        AdapterFileError: `unsupported_file` for a pickle that is not PyTorch's archive or needs
            more than data; `invalid_adapter_file`, malformed; `adapter_too_large`.
        OSError: the path cannot be read.
    """
    # O_NONBLOCK: opening a named pipe must not wait for a writer. It does nothing to a file.
    descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0))
    with os.fdopen(descriptor, "rb") as file:
        status = os.fstat(file.fileno())
        if not stat.S_ISREG(status.st_mode):
            raise AdapterFileError("unsupported_file", "an adapter must be a regular file")
        _check_size(path.name, status.st_size, max_bytes)
        with _archive(file, status.st_size) as members:
            return members.load()


class _Members:
    """The members of an archive that PyTorch wrote."""

    def __init__(self, archive: zipfile.ZipFile, size: int) -> None:
        self._archive = archive
        self._size = size
        self._infos = {info.filename: info for info in archive.infolist()}
        if len(self._infos) != len(archive.infolist()):
            invalid("the archive holds a name twice")
        if sum(info.file_size for info in self._infos.values()) > size:
            invalid("the archive's members claim more bytes than it has")
        programs = [
            name for name in self._infos if name.count("/") == 1 and _last(name) == _PROGRAM
        ]
        if len(programs) != 1:
            raise AdapterFileError(
                "unsupported_file", f"the zip archive is none of PyTorch's: it has no {_PROGRAM}"
            )
        self._folder = programs[0].removesuffix(_PROGRAM)

    def load(self) -> Any:
        """What the program of the archive makes."""
        for name in self._infos:
            if name.removeprefix(self._folder).startswith(_TORCH_SCRIPT):
                raise AdapterFileError("unsupported_file", "the archive is a TorchScript program")
        order = self._folder + _ORDER
        if order in self._infos and self._read(order, 16) != b"little":
            raise AdapterFileError("unsupported_file", "the tensors are not little-endian")
        program = self._read(self._folder + _PROGRAM, MAX_PROGRAM_BYTES)
        storages: dict[str, Storage] = {}

        def storage(key: str, dtype: str, items: int) -> Storage:
            if key not in storages:
                data = self._read(f"{self._folder}data/{key}", None)
                storages[key] = Storage.of(key, dtype, data)
            return storages[key].checked(dtype, items)

        return plain(Machine(program, storage, Budget(self._size)).run())

    def _read(self, name: str, most: int | None) -> bytes:
        info = self._infos.get(name)
        if info is None:
            invalid(f"the archive lacks its member {printable(name)}")
        if most is not None and info.file_size > most:
            message = f"{printable(name)} has {info.file_size} bytes, at most {most} are allowed"
            raise AdapterFileError("adapter_too_large", message)
        if info.compress_type != zipfile.ZIP_STORED or info.compress_size != info.file_size:
            invalid(f"{printable(name)} is compressed, as PyTorch never writes it")
        with self._archive.open(info) as member:
            data = member.read(info.file_size)
        if len(data) != info.file_size:
            invalid(f"{printable(name)} ends early")
        return data


class _Guarded:
    """A file from which no more than some bytes are read at once.

    `zipfile` reads the table of contents at one go, however long the archive says that it is, and
    makes of each of its entries an object ten times as large.
    """

    def __init__(self, file: IO[bytes], size: int) -> None:
        self._file = file
        self._size = size
        self.most: int | None = _MAX_DIRECTORY_BYTES
        self.seek: Callable[..., int] = file.seek
        self.tell: Callable[[], int] = file.tell
        self.seekable: Callable[[], bool] = file.seekable

    def read(self, length: int = -1) -> bytes:
        """As a file's."""
        ahead = self._size - self.tell() if length < 0 else length
        if self.most is not None and ahead > self.most:
            invalid(f"the archive's table of contents has more than {self.most} bytes")
        return self._file.read(length)


@contextmanager
def _archive(file: IO[bytes], size: int) -> Iterator[_Members]:
    start = file.read(4)
    if not start.startswith(b"PK\x03\x04"):
        kind = "a Python pickle" if start[:1] in (b"\x80", b"(", b"c", b"}", b"]") else "something"
        raise AdapterFileError(
            "unsupported_file",
            f"this is {kind} that is not the zip archive that torch.save writes since "
            "PyTorch 1.6; load it with a PyTorch you trust it to, and save it again",
        )
    guarded = _Guarded(file, size)
    try:
        with zipfile.ZipFile(guarded) as archive:
            guarded.most = None
            yield _Members(archive, size)
    except (zipfile.BadZipFile, NotImplementedError, EOFError, RuntimeError, ValueError) as error:
        # RuntimeError: encrypted. ValueError: an offset before the file, say.
        raise AdapterFileError(
            "invalid_adapter_file", f"the zip archive cannot be read: {printable(str(error))}"
        ) from error


def _check_size(name: str, size: int, most: int) -> None:
    if size > most:
        message = f"{printable(name)} has {size} bytes, at most {most} are allowed"
        raise AdapterFileError("adapter_too_large", message)


def _last(name: str) -> str:
    return name.rpartition("/")[2]
