"""What torch.save wrote is read without torch; what is hostile is refused, and runs nothing."""

from __future__ import annotations

import os
import subprocess
import sys
import time
import tracemalloc
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from gossamer.base import unpickle as room
from gossamer.base.unpickle import unpickle
from gossamer.store.errors import AdapterFileError
from gossamer.store.exchange.pickles import PickledSparse, PickledTensor
from tests.base.pickle_attacks import (
    CANARY,
    Attack,
    archive,
    attacks,
    numbers,
    storage,
    tensor,
    text,
)

CORPUS = list(attacks())
#: torch's dtypes and the names that tensors have here.
DTYPES = {
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float64: "F64",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


def saved(path: Path, content: Any, protocol: int = 2) -> Any:
    torch.save(content, path, pickle_protocol=protocol)
    return unpickle(path)


def bits(value: torch.Tensor) -> bytes:
    return value.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_tensors_of_every_dtype_are_read_bit_for_bit(dtype: torch.dtype, tmp_path: Path) -> None:
    value = (torch.randn(5, 7) * 50).to(dtype)
    found = saved(tmp_path / "a.pt", value)
    assert isinstance(found, PickledTensor)
    assert (found.dtype, found.array.shape) == (DTYPES[dtype], (5, 7))
    assert found.array.tobytes() == bits(value)


@pytest.mark.parametrize("protocol", [2, 3, 4])
def test_plain_data_is_what_it_was(protocol: int, tmp_path: Path) -> None:
    content: dict[Any, Any] = {
        "numbers": [0, 1, 255, 256, 65536, -1, -(2**31), 2**40, 2**80, 1.5, -0.0, True, False],
        "texts": ("", "a", "é🙂", "\ud800"),
        "bytes": [b"", b"\x00\xff"],
        7: None,
        "size": torch.Size([2, 3]),
        "ordered": OrderedDict(a=1, b=OrderedDict()),
        "nested": [[[]], (1, (2, 3)), {"x": {"y": []}}],
        "numpy": [np.int64(2**40), np.float32(2.5), np.bool_(True)],
    }
    found = saved(tmp_path / "a.pt", content, protocol)
    assert found == content
    assert [type(one) for one in found["numpy"]] == [int, float, bool]
    assert type(found["size"]) is tuple


def test_views_are_read_as_they_look(tmp_path: Path) -> None:
    whole = torch.arange(60, dtype=torch.int32).reshape(6, 10)
    views = {
        "slice": whole[2:4],
        "column": whole[:, 3],
        "turned": whole.T,
        "stepped": whole[::2, 1::3],
        "expanded": whole[:2, :1].expand(2, 5),
        "number": whole[4, 4],
        "empty": whole[:0],
        "nonzero": (whole % 7 == 0).nonzero(),
        "parameter": torch.nn.Parameter(whole.float()),
    }
    assert not views["nonzero"].is_contiguous()
    for name, found in saved(tmp_path / "a.pt", views).items():
        assert found.array.shape == tuple(views[name].shape), name
        assert found.array.tobytes() == bits(views[name].detach()), name
        assert found.array.flags.c_contiguous


def test_arrays_of_numpy_are_read(tmp_path: Path) -> None:
    arrays = {
        "plain": np.arange(12, dtype=np.int32).reshape(3, 4),
        "fortran": np.asfortranarray(np.arange(12.0).reshape(3, 4)),
        "empty": np.zeros((0, 2), np.float16),
        "number": np.array(3, np.uint8),
        "truths": np.array([True, False]),
    }
    again = {**arrays, "the same": arrays["plain"]}
    for name, found in saved(tmp_path / "a.pt", again).items():
        assert isinstance(found, PickledTensor), name
        assert found.array.shape == again[name].shape
        assert np.array_equal(found.array, again[name])
        assert found.array.dtype.itemsize == again[name].dtype.itemsize


def test_sparse_tensors_are_read(tmp_path: Path) -> None:
    dense = torch.zeros(4, 6)
    dense[1, 2], dense[3, 0] = 2.0, -1.0
    found = saved(tmp_path / "a.pt", dense.to_sparse().coalesce())
    assert isinstance(found, PickledSparse)
    assert found.shape == (4, 6)
    assert found.indices.array.tolist() == [[1, 3], [2, 0]]
    assert found.values.array.tolist() == [2.0, -1.0]


def test_what_holds_itself_is_read(tmp_path: Path) -> None:
    content: dict[str, Any] = {"a": []}
    content["a"].append(content)
    found = saved(tmp_path / "a.pt", content)
    assert found["a"][0] is found


def test_the_programs_of_the_corpus_work_where_they_are_right(tmp_path: Path) -> None:
    # Otherwise the attacks made with them could be refused for a mistake of the corpus.
    values = np.arange(4, dtype="<f4")
    for offset, size, strides in ((0, (4,), (1,)), (1, (3,), (1,)), (0, (2, 2), (1, 2))):
        path = tmp_path / "a.pt"
        path.write_bytes(archive(tensor(offset, size, strides), {"0": values.tobytes()}))
        expected = torch.as_strided(torch.from_numpy(values), size, strides, offset)
        assert np.array_equal(unpickle(path).array, expected.numpy())
        assert torch.equal(torch.load(path, weights_only=True), expected)
    path.write_bytes(archive(b"\x80\x02" + numbers(1, -2, 3) + b"."))
    assert unpickle(path) == (1, -2, 3)
    assert storage(4) in tensor(0, (4,), (1,))


def test_a_number_of_the_memory_is_the_last_ones(tmp_path: Path) -> None:
    """Not that of the dtype, which is built only after it."""
    path = tmp_path / "a.pt"
    begun = b"cnumpy\ndtype\n" + text("u1") + b"\x85Rq\5"
    dtype = begun + b"K\3q\5" + text("<") + b"\x86b"
    one = b"cnumpy.core.multiarray\nscalar\n" + dtype + b"C\1\x2a\x86R"
    path.write_bytes(archive(b"\x80\x02]" + one + b"ah\5a."))
    assert unpickle(path) == [42, 3]


def test_names_in_the_corpus_are_unique() -> None:
    assert len({attack.name for attack in CORPUS}) == len(CORPUS) > 90


@pytest.mark.parametrize("attack", CORPUS, ids=lambda attack: attack.name)
def test_the_attack_is_refused(attack: Attack, tmp_path: Path) -> None:
    path = tmp_path / "a.pt"
    path.write_bytes(attack.data)
    begin = time.thread_time()
    tracemalloc.start()
    try:
        with pytest.raises(AdapterFileError) as refused:
            unpickle(path)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert refused.value.code == attack.code
    assert refused.value.message.isprintable()
    assert len(refused.value.message) < 600
    assert not CANARY.exists()
    assert peak < 250e6 + 4 * len(attack.data)  # a million objects, and the file itself
    assert time.thread_time() - begin < 20
    if not attack.name.startswith("bomb"):
        assert peak < 20e6 + 4 * len(attack.data)


def test_the_corpus_does_harm_elsewhere(tmp_path: Path) -> None:
    # Otherwise "nothing was run" would say nothing.
    import pickle

    from tests.base.pickle_attacks import Calls

    victim = tmp_path / "made"
    pickle.loads(pickle.dumps(Calls(os.mkdir, str(victim))))  # noqa: S301
    assert victim.exists()


def test_no_wrong_byte_in_a_program_kills_the_process(tmp_path: Path) -> None:
    """Every byte of an honest program, changed: refused or read, in a process that lives on."""
    torch.save({"a": torch.ones(2, 3), "b": np.arange(3), "c": [1, "x", None]}, tmp_path / "a.pt")
    done = subprocess.run(
        [sys.executable, "-O", "-c", _MUTATE, str(tmp_path / "a.pt")],
        capture_output=True,
        text=True,
        timeout=200,
        cwd=Path(__file__).parents[2],
    )
    assert done.returncode == 0, done.stderr[-2000:]
    refused, read = map(int, done.stdout.split())
    assert refused > read > 10


_MUTATE = """
import random, sys, zipfile
from pathlib import Path
from gossamer.base.unpickle import unpickle
from gossamer.store.errors import AdapterFileError
from tests.base.pickle_attacks import archive
path, generator = Path(sys.argv[1]), random.Random(0)
with zipfile.ZipFile(path) as file:
    program = file.read("a/data.pkl")
    storages = {n.rpartition("/")[2]: file.read(n) for n in file.namelist() if "/data/" in n}
refused = read = 0
for at in range(len(program)):
    for _ in range(4):
        changed = bytearray(program)
        changed[at] = generator.randrange(256)
        path.write_bytes(archive(bytes(changed), storages))
        try:
            unpickle(path)
            read += 1
        except AdapterFileError:
            refused += 1
print(refused, read)
"""


def test_sizes_are_capped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.pt"
    torch.save(torch.ones(1000), path)
    size = path.stat().st_size
    assert unpickle(path, max_bytes=size).array.size == 1000
    with pytest.raises(AdapterFileError) as refused:
        unpickle(path, max_bytes=size - 1)
    assert refused.value.code == "adapter_too_large"
    monkeypatch.setattr(room, "MAX_PROGRAM_BYTES", 50)
    with pytest.raises(AdapterFileError, match=r"data\.pkl has") as refused:
        unpickle(path)
    assert refused.value.code == "adapter_too_large"


def test_a_pipe_is_no_file(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(AdapterFileError, match="regular file"):
        unpickle(tmp_path / "pipe")


def test_torch_is_not_needed() -> None:
    probe = "import sys, gossamer.base.unpickle; print('torch' in sys.modules)"
    found = subprocess.run(
        [sys.executable, "-c", probe], capture_output=True, text=True, check=True
    )
    assert found.stdout.strip() == "False"
