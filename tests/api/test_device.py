"""What a base runs on, in which type, and what is left for KV pages and adapters."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from gossamer.api.device import (
    HOST_BYTES,
    Device,
    DeviceError,
    check_attention,
    choose_device,
    memory_budget,
    share_of,
)
from gossamer.api.services import engine_config
from gossamer.api.settings import Settings
from gossamer.base.load import BaseFiles
from gossamer.engine.config import EngineConfig
from tests.kernels.flashinfer_stand_in import install

CPU = torch.device("cpu")


@pytest.fixture
def base(tiny_dir: Callable[..., Path]) -> BaseFiles:
    return BaseFiles("tiny", tiny_dir("llama"), "0" * 64)


@pytest.fixture
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """As torch answers where there is one."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)


@pytest.mark.usefixtures("no_gpu")
def test_without_a_gpu_it_is_the_cpu_in_float32(base: BaseFiles) -> None:
    host = Device(CPU, torch.float32, "cpu")
    assert choose_device(Settings(), base) == host
    assert choose_device(Settings(device="cpu", dtype="float32"), base) == host
    with pytest.raises(DeviceError, match="GOSSAMER_DTYPE"):
        choose_device(Settings(dtype="bfloat16"), base)
    with pytest.raises(DeviceError, match="GOSSAMER_DEVICE=cpu"):
        choose_device(Settings(device="cuda"), base)


@pytest.mark.usefixtures("gpu")
def test_a_gpu_runs_in_16_bits_unless_told_otherwise(base: BaseFiles, tmp_path: Path) -> None:
    assert choose_device(Settings(), base) == Device(
        torch.device("cuda", 0), torch.bfloat16, "triton"
    )
    assert choose_device(Settings(dtype="float32"), base).dtype is torch.float32
    assert choose_device(Settings(device="cpu"), base) == Device(CPU, torch.float32, "cpu")
    half = tmp_path / "half"
    half.mkdir()
    from safetensors.torch import save_file

    save_file({"x": torch.zeros(2, dtype=torch.float16)}, half / "model.safetensors")
    files = BaseFiles("half", half, "0" * 64)
    assert choose_device(Settings(), files).dtype is torch.float16


def test_the_budget_is_what_was_said_or_what_is_free(monkeypatch: pytest.MonkeyPatch) -> None:
    assert memory_budget(Settings(), CPU) == HOST_BYTES
    assert memory_budget(Settings(memory_bytes=5), CPU) == 5
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (100 << 30, 140 << 30))
    assert memory_budget(Settings(), torch.device("cuda", 0)) == 89 << 30
    assert memory_budget(Settings(memory_bytes=5), torch.device("cuda", 0)) == 5
    with pytest.raises(DeviceError, match="1024 MiB"):
        share_of(1 << 30)


def test_an_attention_that_cannot_be_had_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch)
    wanted = Settings(attention="flashinfer")
    host = Device(CPU, torch.float32, "cpu")
    gpu = Device(torch.device("cuda", 0), torch.bfloat16, "triton")
    check_attention(Settings(), host, 80)
    check_attention(wanted, gpu)
    check_attention(wanted, gpu, 128)
    for chosen, head_dim, said in (
        (host, None, "CPU"),
        (replace(gpu, dtype=torch.float32), None, "float32"),
        (gpu, 80, "80"),
    ):
        with pytest.raises(DeviceError, match=said) as caught:
            check_attention(wanted, chosen, head_dim)
        assert "--attention" in caught.value.remedy
    monkeypatch.setitem(sys.modules, "flashinfer", None)
    with pytest.raises(DeviceError, match=r"pip install 'gossamer\[flashinfer\]'"):
        check_attention(wanted, gpu)


def test_a_device_reaches_the_engine() -> None:
    chosen = Device(torch.device("cuda", 0), torch.bfloat16, "triton")
    assert engine_config(Settings(memory_bytes=1), chosen).attention == EngineConfig().attention
    settings = Settings(
        memory_bytes=1 << 20, int8_adapters=True, host_bytes=7, attention="flashinfer"
    )
    config = engine_config(settings, chosen)
    assert config.attention == "flashinfer"
    assert (config.kernels, config.int8_adapters, config.host_bytes) == ("triton", True, 7)
    assert config.memory_bytes == 1 << 20
