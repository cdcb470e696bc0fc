from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from gossamer.kernels import paged_attention
from gossamer.kernels.cpu.parallel import Kernel, descriptor, float_bits, scratch
from gossamer.kernels.cpu.simd import (
    fetch_add,
    load_f64,
    load_i64,
    store_f32,
    tile_load,
    tile_store,
    tile_transpose,
)
from gossamer.kernels.cpu.simd_softmax import tile_exp_minus

linux = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")

# One team, torch's: no second OpenMP runtime in the process, and no second set of threads.
ONE_TEAM = """
import os, torch
torch.set_num_threads(2)
torch.mm(torch.ones(512, 512), torch.ones(512, 512))
from gossamer.kernels.cpu.kv_cache import _write
from gossamer.kernels.cpu.parallel import descriptor
_write.compile()
before = len(os.listdir("/proc/self/task"))
_write.launch(descriptor([0] * 17), 2)
with open("/proc/self/maps") as maps:
    runtimes = {line.split()[-1] for line in maps if "omp.so" in line or "omp-" in line}
print(len(runtimes), len(os.listdir("/proc/self/task")) - before)
"""

CACHED = """
from gossamer.kernels.cpu.kv_cache import _write
_write.compile()
print(_write._compiled.cache_hits, _write.address != 0)
"""


def run(script: str, **environment: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True,
        text=True,
        env={**os.environ, **environment},
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@linux
def test_kernels_run_on_the_team_that_torch_has_started() -> None:
    assert run(ONE_TEAM) == "1 0"


def test_machine_code_is_kept_on_disk(tmp_path: Path) -> None:
    assert run(CACHED, NUMBA_CACHE_DIR=str(tmp_path)) == "0 True"
    assert run(CACHED, NUMBA_CACHE_DIR=str(tmp_path)) == "1 True"
    assert list(tmp_path.rglob("*.nbi"))


def test_without_a_place_to_keep_it_kernels_still_compile(tmp_path: Path) -> None:
    blocked = tmp_path / "file"
    blocked.touch()
    output = run(
        CACHED,
        NUMBA_CACHE_DIR=str(blocked),
        NUMBA_CACHE_LOCATOR_CLASSES="UserProvidedCacheLocator",
    )
    assert output == "0 True"


@Kernel
def _draw(d: int) -> None:
    """Counts every ticket below the limit once."""
    ticket = fetch_add(d, 1)
    while ticket < load_i64(d + 8):
        fetch_add(d + 16, ticket)
        ticket = fetch_add(d, 1)


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_every_ticket_is_drawn_once(threads: int) -> None:
    for _ in range(50):
        d = descriptor((0, 1000, 0))
        _draw.launch(d, threads)
        assert d[2] == 1000 * 999 // 2


@Kernel
def _transpose(d: int) -> None:
    tile = tile_transpose(tile_load(16, 1, 16, load_i64(d), 64))
    tile_store(tile, 1, load_i64(d + 8), 64)


def test_a_tile_is_transposed_in_registers() -> None:
    source, target = torch.randn(16, 16), torch.zeros(16, 16)
    _transpose.launch(descriptor((source.data_ptr(), target.data_ptr())), 1)
    assert torch.equal(target, source.t())


@Kernel
def _exp(d: int) -> None:
    for i in range(0, load_i64(d + 8), 16):
        at = load_i64(d) + 4 * i
        tile_store(tile_exp_minus(tile_load(1, 1, 16, at, 0), load_f64(d + 16)), 1, at, 0)


def test_the_exponential_is_exact_to_two_parts_in_ten_million() -> None:
    x = torch.linspace(-86, 40, 1 << 16)
    want = (x - 0.5).double().exp()
    got = x.clone()
    _exp.launch(descriptor((got.data_ptr(), len(got), float_bits(0.5))), 1)
    assert ((got.double() - want).abs() / want).max() < 2e-7
    edge = torch.tensor([-1e30, -torch.inf, torch.nan, torch.inf] * 4)
    _exp.launch(descriptor((edge.data_ptr(), 16, float_bits(0.0))), 1)
    assert (edge[:2] < 1e-37).all()
    assert edge[2].isnan()
    assert edge[3] > 1e38


@Kernel
def _store(d: int) -> None:
    store_f32(load_i64(d), load_f64(d + 8))


def test_scratch_is_kept_and_grows() -> None:
    small = scratch(1000)
    assert small % 64 == 0
    assert scratch(10) == small
    large = scratch(1 << 20)
    _store.launch(descriptor((large + (1 << 20) - 4, float_bits(1.5))), 1)
    assert scratch(1000) == large


def test_a_step_without_rows_is_fine() -> None:
    pages = torch.zeros(1, 1, 16, 16)
    none = torch.zeros(1, dtype=torch.int32)
    out = paged_attention(
        torch.zeros(0, 1, 16), pages, pages, none[:0, None], none, none[:0], scale=1.0
    )
    assert out.shape == (0, 1, 16)
