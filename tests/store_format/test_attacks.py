"""Hostile files are refused with the right code, quickly, and nothing else happens."""

from __future__ import annotations

import contextlib
import io
import json
import os
import struct
import subprocess
import sys
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import pytest

from gossamer.store.delta import Delta, DeltaSet
from gossamer.store.errors import AdapterFileError
from gossamer.store.format import Limits, ServingDtype, inspect, open_validated, read, write
from tests.store_format import foreign, headers
from tests.store_format.attacks import Attack, Target, attacks
from tests.store_format.container import (
    container,
    frame,
    group,
    metadata,
    module,
    positions,
    squeezed,
)

TABLE = {"model.layers.0.q.weight": (12, 10), "model.layers.0.v.weight": (6, 10)}
NAME = "model.layers.0.q.weight"
FINGERPRINT = "sha256:" + "11" * 32
CORPUS = list(attacks(TABLE, FINGERPRINT))

#: Runs the corpus in its own interpreter: the refusals as JSON, or death.
_RUNNER = """
import json, sys
from tests.store_format.test_attacks import CORPUS, refusal
print(json.dumps([sys.flags.optimize, [[a.name, *refusal(a.data)] for a in CORPUS]]))
"""


def refusal(data: bytes) -> tuple[str, str | None, int | None]:
    """Code, tensor and position of the refusal; ("accepted", None, None) without one."""
    try:
        open_validated(data, TABLE, base_fingerprint=FINGERPRINT)
    except AdapterFileError as error:
        return error.code, error.tensor, error.position
    return "accepted", None, None


def test_the_untouched_file_is_accepted() -> None:
    # Otherwise everything below could be refused for a mistake of the corpus.
    target = Target(NAME, TABLE[NAME], FINGERPRINT)
    assert refusal(target.raw([0, 1, 119])) == ("accepted", None, None)
    row = group(module(NAME, (12, 10), 4), positions="gaps", shift=4, high_planes=1)
    plain, low = squeezed(bytes(4)), squeezed(bytes(2))
    tensors = [frame(f"{NAME}.positions.high0", plain), frame(f"{NAME}.positions.low", low)]
    tensors.append((f"{NAME}.values", "BF16", [4], bytes(8)))
    assert refusal(container(metadata([row], FINGERPRINT), tensors))[0] == "accepted"


def test_names_in_the_corpus_are_unique() -> None:
    assert len({attack.name for attack in CORPUS}) == len(CORPUS) > 150


@pytest.mark.parametrize("attack", CORPUS, ids=lambda a: a.name)
def test_the_attack_is_refused_with_its_code(attack: Attack) -> None:
    code, tensor, position = refusal(attack.data)
    assert code == attack.code
    assert position == attack.entry
    if attack.weight:
        assert tensor == NAME
    if tensor is not None:
        assert tensor.isprintable()
        assert len(tensor) < 300


@pytest.mark.parametrize("door", [read, inspect])
def test_the_other_doors_raise_nothing_else(door: Callable[[bytes], object]) -> None:
    refused = 0
    for attack in CORPUS:
        with contextlib.suppress(AdapterFileError):
            door(attack.data)
            continue
        refused += 1
    assert refused > len(CORPUS) // 2


@pytest.mark.parametrize("flags", [[], ["-O"]], ids=["plain", "optimised"])
def test_the_validator_survives_the_corpus_in_its_own_process(flags: list[str]) -> None:
    done = subprocess.run(
        [sys.executable, *flags, "-c", _RUNNER],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[2],
        timeout=120,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    optimize, rows = json.loads(done.stdout)
    assert optimize == len(flags)
    found = {name: (code, position) for name, code, _, position in rows}
    assert found == {a.name: (a.code, a.entry) for a in CORPUS}


def test_nothing_foreign_was_executed_or_unpacked() -> None:
    for _, data in foreign.files():
        refusal(data)
    assert not foreign.CANARY.exists()


@pytest.mark.parametrize(("label", "data"), list(headers.bombs()), ids=lambda x: str(x)[:40])
def test_a_header_bomb_costs_little(label: str, data: bytes) -> None:
    times = []
    for _ in range(5):
        begin = time.thread_time()  # the neighbours on this machine are not the bomb's doing
        refusal(data)
        times.append(time.thread_time() - begin)
    if sys.gettrace() is None:  # a coverage run traces every line
        assert min(times) < 0.05
    tracemalloc.start()
    refusal(data)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 50e6


def test_a_declared_size_is_refused_before_anything_is_decoded() -> None:
    for attack in CORPUS:
        if not attack.name.startswith(("size:", "frame: 16 MiB", "frame: a bomb")):
            continue
        tracemalloc.start()
        assert refusal(attack.data)[0] == attack.code
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert peak < 2e6, attack.name


def test_limits_are_obeyed(tmp_path: Path) -> None:
    delta = Delta.element((12, 10), range(100), [1.0] * 100)
    path = tmp_path / "a.safetensors"
    size = write(DeltaSet(FINGERPRINT, "b", {NAME: delta}), path).size
    assert open_validated(path, TABLE).nnz == 100
    for limits in (
        Limits(max_file_bytes=size - 1),
        Limits(max_decoded_bytes=1199),
        Limits(max_expansion=0, free_decoded_bytes=1199),
    ):
        with pytest.raises(AdapterFileError) as refused:
            open_validated(path, TABLE, limits=limits)
        assert refused.value.code == "adapter_too_large"
    exact = Limits(max_file_bytes=size, max_decoded_bytes=1200, max_expansion=0)
    assert open_validated(path, TABLE, limits=exact).nnz == 100


@pytest.mark.parametrize(("dtype", "value"), [("float16", 65519.0), ("bfloat16", 3.395e38)])
def test_values_must_be_finite_in_the_serving_dtype(dtype: ServingDtype, value: float) -> None:
    row = group(module(NAME, (12, 10), 1), dtype="F32")
    bits = (f"{NAME}.values", "F32", [1], struct.pack("<f", value))
    data = container(metadata([row], FINGERPRINT), [positions(NAME, [7]), bits])
    generous = Limits(max_magnitude=1e39)
    assert open_validated(data, TABLE, limits=generous).nnz == 1
    with pytest.raises(AdapterFileError, match="larger than"):
        open_validated(data, TABLE, limits=generous, serving_dtype=dtype)


def _bytes(delta_set: DeltaSet) -> bytes:
    buffer = io.BytesIO()
    write(delta_set, buffer)
    return buffer.getvalue()


def test_three_mismatches_are_named_and_no_more() -> None:
    deltas = {f"w{i}": Delta.element((2, 2), [0], [1.0]) for i in range(5)}
    data = _bytes(DeltaSet("", "another", deltas))
    with pytest.raises(AdapterFileError) as refused:
        open_validated(data, TABLE, base_fingerprint=FINGERPRINT)
    assert refused.value.code == "base_model_mismatch"
    assert [f"w{i} is" in refused.value.message for i in range(5)] == [True] * 3 + [False] * 2


def test_a_file_without_a_fingerprint_is_judged_by_names_and_shapes() -> None:
    delta_set = DeltaSet("", "b", {NAME: Delta.element((12, 10), [0], [1.0])})
    opened = open_validated(_bytes(delta_set), TABLE, base_fingerprint=FINGERPRINT)
    assert opened.base_fingerprint == ""


def test_foreign_files_name_the_converter() -> None:
    for label, data in foreign.files():
        with pytest.raises(AdapterFileError, match="gossamer adapters import"):
            open_validated(data, TABLE)
        assert label


def test_a_pipe_is_no_adapter(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(AdapterFileError, match="regular file"):
        inspect(tmp_path / "pipe")
