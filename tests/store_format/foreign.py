"""Files of other formats, each dangerous or useless to open; `CANARY` must never come to exist."""

from __future__ import annotations

import gzip
import io
import os
import pickle
import tarfile
import tempfile
import zipfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from tests.store_format.container import container

CANARY = Path(tempfile.gettempdir()) / f"gossamer-canary-{os.getpid()}"


class _Touch:
    """Unpickled, it would create the canary."""

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return (os.mkdir, (str(CANARY),))


def files() -> Iterator[tuple[str, bytes]]:
    """Name and bytes."""
    for protocol in (0, 2, 4, 5):
        payload = pickle.dumps({"weight": _Touch()}, protocol=protocol)
        yield f"pickle, protocol {protocol}", payload
    yield "PyTorch checkpoint", _zipped({"archive/data.pkl": pickle.dumps(_Touch())})
    yield "zip that climbs out", _zipped({f"../../..{CANARY}": b"x"})
    yield "gzip bomb", gzip.compress(bytes(1 << 24))
    yield "tar with a symlink", _tarred()
    yield "NumPy file of objects", _numpy(np.array([_Touch()], dtype=object))
    archive = io.BytesIO()
    np.savez(archive, positions=np.arange(3))
    yield "NumPy archive", archive.getvalue()
    yield "GGUF", b"GGUF" + bytes(64)
    yield "bzip2", b"BZh9" + bytes(64)
    yield "xz", b"\xfd7zXZ\0" + bytes(64)
    yield "zstandard", b"\x28\xb5\x2f\xfd" + bytes(64)
    yield "HDF5", b"\x89HDF\r\n\x1a\n" + bytes(64)
    shira = ("base_model.model.q_proj.shira_weight", "F32", [1], bytes(4))
    yield "safetensors of another library", container({"format": "pt"}, [shira])
    yield "safetensors without metadata", container(None, [shira])


def _zipped(members: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, data in members.items():
            archive.writestr(name, data)
    return buffer.getvalue()


def _tarred() -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        link = tarfile.TarInfo("adapter.safetensors")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        archive.addfile(link)
    return buffer.getvalue()


def _numpy(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=True)
    return buffer.getvalue()
