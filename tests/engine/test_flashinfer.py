"""An engine whose prompts attend by FlashInfer: through a stand-in, on the Triton interpreter."""

from __future__ import annotations

import sys
from typing import Any

import pytest
import torch
from transformers import Gemma2Config, LlamaConfig, PreTrainedModel

from gossamer.engine.client import Engine
from gossamer.engine.config import EngineConfig
from gossamer.engine.errors import UnsupportedModel
from gossamer.engine.messages import Request, Sampling
from gossamer.kernels import BackendUnavailableError
from tests import tiny
from tests.engine.running import ask, prompts, running, started, tokens_of
from tests.kernels.flashinfer_stand_in import BatchPrefillWithPagedKVCacheWrapper, install

LENGTHS = (3, 19)
FEW = Sampling(max_tokens=3, temperature=0, ignore_eos=True)

pytestmark = pytest.mark.usefixtures("interpreter")
Wrapper = type[BatchPrefillWithPagedKVCacheWrapper]


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> Wrapper:
    return install(monkeypatch)


def model_of(arch: str, monkeypatch: pytest.MonkeyPatch, head_dim: int = 64) -> PreTrainedModel:
    """Two layers in float16, with heads of a width that FlashInfer takes."""
    few = {"head_dim": head_dim, "num_hidden_layers": 2}
    windows = {"sliding_window": tiny.SLIDING_WINDOW, "attn_logit_softcapping": 4.0}
    configs = {
        "llama": lambda **kw: LlamaConfig(**kw | few),
        "gemma2": lambda **kw: Gemma2Config(query_pre_attn_scalar=head_dim, **kw | few | windows),
    }
    monkeypatch.setitem(tiny.CONFIGS, arch, configs[arch])
    model: PreTrainedModel = tiny.tiny_model(arch).half()
    return model


def answered(engine: Engine) -> list[list[int]]:
    """Greedy tokens after two prompts at once, the longer one in chunks."""
    texts = prompts(LENGTHS, tiny.VOCAB_SIZE)
    answers = ask(engine, *(Request(str(i), t, sampling=FEW) for i, t in enumerate(texts)))
    return [tokens_of(answer) for answer in answers]


# Gemma 2 has layers with a window and layers without: two plans a step.
@pytest.mark.parametrize(
    ("arch", "kinds", "graphs"),
    [pytest.param("llama", 1, True, marks=pytest.mark.gate), ("gemma2", 2, False)],
)
def test_interpret_it_says_the_same(
    arch: str, kinds: int, graphs: bool, stand_in: Wrapper, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings: dict[str, Any] = {"kernels": "triton", "max_step_tokens": 16, "graphs": graphs}
    with running(model_of(arch, monkeypatch), **settings) as engine:
        ours = answered(engine)
    assert stand_in.plans == 0
    with running(model_of(arch, monkeypatch), attention="flashinfer", **settings) as engine:
        assert answered(engine) == ours
        before = stand_in.plans
        ask(engine, Request("again", (5, 9, 7), sampling=FEW))
    # One step for the prompt, two that decode; those are ours where they are captured.
    assert stand_in.plans - before == (kinds if graphs else 3 * kinds)


def test_interpret_one_that_computes_something_else_is_refused_at_start(
    stand_in: Wrapper, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = stand_in.run
    monkeypatch.setattr(stand_in, "run", lambda *args, **kwargs: run(*args, **kwargs).roll(1, 0))
    with pytest.raises(UnsupportedModel, match="differ"):
        started(model_of("llama", monkeypatch), kernels="triton", attention="flashinfer")


@pytest.mark.usefixtures("stand_in")
def test_interpret_a_base_that_it_does_not_take_is_refused_at_start(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for model, said in (
        (model_of("llama", monkeypatch).float(), "float32"),
        (model_of("llama", monkeypatch, head_dim=32), "heads of width"),
    ):
        with pytest.raises(BackendUnavailableError, match=said):
            started(model, kernels="triton", attention="flashinfer")
    monkeypatch.setitem(sys.modules, "flashinfer", None)
    with pytest.raises(BackendUnavailableError, match=r"gossamer\[flashinfer\]"):
        started(model_of("llama", monkeypatch), kernels="triton", attention="flashinfer")


def test_on_a_cpu_there_is_none() -> None:
    for kernels in ("cpu", "reference"):
        with pytest.raises(ValueError, match="flashinfer"):
            EngineConfig(kernels=kernels, attention="flashinfer")
    assert EngineConfig(kernels="triton", attention="flashinfer").attention == "flashinfer"


@pytest.mark.gpu
@pytest.mark.parametrize("arch", ["llama", "gemma2"])
def test_the_real_one_says_the_same(arch: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("flashinfer")
    said = []
    for attention in ("triton", "flashinfer"):
        model = model_of(arch, monkeypatch)
        model.to(torch.device("cuda"))  # type: ignore[arg-type]
        with running(model, kernels="triton", max_step_tokens=16, attention=attention) as engine:
            said.append(answered(engine))
    assert said[0] == said[1]
