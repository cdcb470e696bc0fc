"""The base alone: every architecture gives the tokens of transformers' `generate`."""

from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    FalconConfig,
    LlamaConfig,
    MambaConfig,
    PreTrainedModel,
    StableLmConfig,
)

from gossamer.engine.client import Engine
from gossamer.engine.config import EngineConfig
from gossamer.engine.errors import UnsupportedModel
from gossamer.engine.messages import Request, Sampling
from gossamer.engine.short_modules import RMSNorm
from gossamer.store.delta import DeltaSet
from tests.engine.running import TOKENIZER, ask, generate, prompts, running, tokens_of
from tests.tiny import ARCHS, COMMON, VOCAB_SIZE, tiny_model

GREEDY = Sampling(max_tokens=24, temperature=0, ignore_eos=True)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("arch", ARCHS)
def test_a_ragged_chunked_batch_equals_generate(arch: str, backend: str) -> None:
    wanted_model = tiny_model(arch)
    texts = prompts((1, 7, 16, 17, 30, 64, 100), VOCAB_SIZE)
    wanted = [generate(wanted_model, text, 24) for text in texts]
    config: dict[str, Any] = {"max_rows": 5, "max_step_tokens": 48, "max_mixed_step_tokens": 20}
    with running(tiny_model(arch), kernels=backend, **config) as engine:
        answers = ask(
            engine, *(Request(str(i), text, sampling=GREEDY) for i, text in enumerate(texts))
        )
    assert [tokens_of(a) for a in answers] == wanted
    assert wanted != [generate(tiny_model(arch, seed=1), text, 24) for text in texts]


@pytest.mark.parametrize("tied", [True, False])
def test_tied_and_untied_embeddings(tied: bool) -> None:
    text = prompts((9,), VOCAB_SIZE)[0]
    wanted = generate(tiny_model("llama", tied=tied), text, 24)
    with running(tiny_model("llama", tied=tied)) as engine:
        (answer,) = ask(engine, Request("0", text, sampling=GREEDY))
    assert tokens_of(answer) == wanted


@pytest.mark.parametrize("arch", ARCHS)
def test_projections_are_packed_and_norms_fused(arch: str) -> None:
    with running(tiny_model(arch)) as engine:
        weights = engine._loop._runner.patch_map.weights
        model = engine._loop._runner._model
    layers = COMMON["num_hidden_layers"]
    assert len(weights) == 4 * layers  # qkv, o, gate+up, down
    assert sum(isinstance(m, RMSNorm) for m in model.modules()) >= 2 * layers + 1


def test_a_shared_prefix_gives_the_same_tokens() -> None:
    head = prompts((50,), VOCAB_SIZE)[0]
    texts = [head + tail for tail in prompts((1, 5, 20), VOCAB_SIZE, seed=2)]
    wanted = [generate(tiny_model("qwen3"), text, 24) for text in texts]
    with running(tiny_model("qwen3")) as engine:
        first, *others = [
            ask(engine, Request(str(i), text, sampling=GREEDY))[0] for i, text in enumerate(texts)
        ]
        assert engine.stats().cached_tokens == 2 * 48
    assert [tokens_of(a) for a in (first, *others)] == wanted


def test_rows_that_gave_way_for_memory_give_the_same_tokens() -> None:
    texts = prompts((30, 30, 30), VOCAB_SIZE)
    wanted = [generate(tiny_model("llama"), text, 40) for text in texts]
    sampling = Sampling(max_tokens=40, temperature=0, ignore_eos=True)
    page = 2 * 3 * 16 * 2 * 16 * 4  # k and v, layers, tokens, kv heads, width, bytes
    with running(tiny_model("llama"), memory_bytes=9 * page, prefix_sharing=False) as engine:
        answers = ask(
            engine, *(Request(str(i), text, sampling=sampling) for i, text in enumerate(texts))
        )
        computed = engine.stats().prompt_tokens
    assert [tokens_of(a) for a in answers] == wanted
    assert computed > sum(map(len, texts))


def _no_source(digest: str) -> DeltaSet:
    raise KeyError(digest)


def _random(config: object) -> PreTrainedModel:
    torch.manual_seed(0)
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config)
    model.requires_grad_(requires_grad=False)
    model.eval()
    return model


SMALL: dict[str, Any] = {"hidden_size": 32, "num_hidden_layers": 2, "vocab_size": VOCAB_SIZE}


@pytest.mark.parametrize(
    ("config", "why"),
    [
        (
            StableLmConfig(
                num_attention_heads=4, num_key_value_heads=4, intermediate_size=48, **SMALL
            ),
            "attention interface",
        ),
        (FalconConfig(num_attention_heads=4, **SMALL), "attention interface"),
        (MambaConfig(**SMALL), "attention interface"),
        (
            LlamaConfig(
                num_attention_heads=4,
                intermediate_size=48,
                rope_parameters={"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0},
                **SMALL,
            ),
            "depends on the whole batch",
        ),
    ],
    ids=["stablelm", "falcon", "mamba", "dynamic-rope"],
)
def test_what_cannot_be_served_right_is_refused_by_name(config: object, why: str) -> None:
    model = _random(config)
    with pytest.raises(UnsupportedModel, match=why) as refused:
        Engine(model, TOKENIZER, _no_source, EngineConfig(memory_bytes=1 << 24), fingerprint="")
    assert refused.value.architecture == type(model).__name__


def test_the_probe_sees_a_wrong_result(monkeypatch: pytest.MonkeyPatch) -> None:
    from gossamer.engine import attention

    right = attention.paged_attention  # type: ignore[attr-defined]

    def wrong(*args: object, **kwargs: object) -> torch.Tensor:
        return right(*args, **(kwargs | {"sliding_window": 3}))  # type: ignore[arg-type]

    monkeypatch.setattr(attention, "paged_attention", wrong)
    with (
        pytest.raises(UnsupportedModel, match="differ from transformers'"),
        running(tiny_model("llama")),
    ):
        pass
