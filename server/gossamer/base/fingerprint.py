"""The fingerprint: which base model this is, whatever files, dtype or device it came in.

A fingerprint is the lower-case hexadecimal SHA-256 of this byte string, all integers little-endian:

    b"gossamer base fingerprint 1\\n"
    then for every parameter of the loaded model, in byte order of its UTF-8 name:
        u32  length of the name in bytes
             the name
        u32  number of dimensions
        u64  each dimension
             the values as IEEE float32, row-major

The parameters are those of the transformers model as its files load, before anything casts, packs
or transposes them; a parameter known by several names (a tied output projection) counts once, under
the first name in module order, which is that of the input embedding. fp16 and bf16 values are
widened to float32, which is exact, so the same weights stored in a wider type have the same
fingerprint; a model loaded in a narrower type than its files hold has another one. Buffers do not
count: they follow from the configuration.
"""

from __future__ import annotations

import hashlib
import json
import os
import struct
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from transformers import PreTrainedModel

from gossamer.base.errors import UnsupportedBaseError
from gossamer.base.fetch import Progress, silent

HEADER = b"gossamer base fingerprint 1\n"
#: Values cast and hashed at a time: as many as PyTorch casts without waking a second thread, whose
#: hand-over costs more than the work when the cores are busy. 135 M bf16 values on 2 overloaded
#: cores, medians of 5 in turn: 1.1 s with 2^15, 22 s with 2^16, 4.0 s with 2^20; the hash alone of
#: as many bytes takes 1.1 s there.
CHUNK = 1 << 15
EXACT_IN_FP32 = (torch.float32, torch.bfloat16, torch.float16)


def fingerprint(model: PreTrainedModel, progress: Progress = silent) -> str:
    """The fingerprint of a loaded model (the module's docstring defines it).

    Works in chunks of 128 KiB, so a bf16 model is never copied to fp32 as a whole; parameters may
    lie on any device.

    Raises:
        UnsupportedBaseError: a parameter is quantized or wider than float32, or has no values.
    """
    parameters = sorted(model.named_parameters(), key=lambda item: item[0].encode())
    total = sum(4 * parameter.numel() for _, parameter in parameters)
    done = 0
    sha256 = hashlib.sha256(HEADER)
    for name, parameter in parameters:
        if parameter.dtype not in EXACT_IN_FP32 or parameter.is_meta:
            kind = "no values" if parameter.is_meta else f"dtype {parameter.dtype}"
            raise UnsupportedBaseError(
                type(model).__name__,
                f"its parameter {name} has {kind}",
                "Use a checkpoint in float32, bfloat16 or float16",
            )
        encoded, shape = name.encode(), parameter.shape
        sha256.update(struct.pack("<I", len(encoded)) + encoded)
        sha256.update(struct.pack(f"<I{len(shape)}Q", len(shape), *shape))
        for values in _chunks(parameter.detach()):
            sha256.update(values)
        done += 4 * parameter.numel()
        progress("fingerprint", done, total)
    return sha256.hexdigest()


def _chunks(parameter: torch.Tensor) -> Iterator[memoryview]:
    """The values as little-endian float32, in pieces that are valid until the next one is taken."""
    flat = parameter.reshape(-1)
    # One buffer for all of them: fresh memory for each costs as much again as the cast and the hash
    scratch = torch.empty(min(CHUNK, flat.numel()))
    for start in range(0, flat.numel(), CHUNK):
        piece = flat[start : start + CHUNK]
        if piece.device.type != "cpu" or piece.dtype != torch.float32:
            piece = scratch[: piece.numel()].copy_(piece)
        yield piece.numpy().astype("<f4", copy=False).data.cast("B")


class StatCache:
    """Remembers a digest that is costly to compute, as long as the files it was made of stay as
    they are: same paths, sizes and modification times (ns).

    One small JSON file for each subject, so that writers never meet; an unreadable one counts as
    absent.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def get(self, subject: Path, files: Iterable[Path]) -> str | None:
        """The digest kept for `subject`, or None when there is none or a file has changed."""
        try:
            record = json.loads(self._record(subject).read_text())
            kept, digest = record["files"], record["digest"]
        except (OSError, ValueError, KeyError, TypeError):
            return None
        if not isinstance(digest, str) or len(digest) != 64 or not set(digest) <= HEX:
            return None
        return digest if kept == _stats(files) else None

    def put(self, subject: Path, files: Iterable[Path], digest: str) -> None:
        """Keep a digest; atomic, last writer wins."""
        self._folder.mkdir(parents=True, exist_ok=True)
        record = self._record(subject)
        text = json.dumps(
            {"subject": str(subject.resolve()), "files": _stats(files), "digest": digest}, indent=1
        )
        draft = record.with_suffix(f".{os.getpid()}")
        draft.write_text(text)
        draft.replace(record)

    def _record(self, subject: Path) -> Path:
        key = hashlib.sha256(str(subject.resolve()).encode()).hexdigest()[:16]
        return self._folder / f"{key}.json"


HEX = frozenset("0123456789abcdef")


def _stats(files: Iterable[Path]) -> list[list[str | int]]:
    stats = [(str(path.resolve()), path.stat()) for path in sorted(files)]
    return [[path, stat.st_size, stat.st_mtime_ns] for path, stat in stats]
