"""Six random adapters on one tiny model, requests for them, and what they must answer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from gossamer.base.patch_map import adapter_table
from gossamer.engine.client import Engine
from gossamer.engine.errors import EngineError
from gossamer.engine.messages import Failed, Message, Request, Sampling
from gossamer.merge import BASE, Member, Mix, canonical
from gossamer.store.format import digest
from tests.engine.running import ask, generate, prompts, running
from tests.engine.test_mixes import dense, random_adapter
from tests.tiny import VOCAB_SIZE, tiny_model

MODEL = tiny_model("llama")
TABLE = adapter_table(MODEL)
SETS = [random_adapter(TABLE, "element", 0.05, 0.1, seed) for seed in range(6)]
ADAPTERS = {digest(s): s for s in SETS}
NAMES = list(ADAPTERS)
MIXES = [canonical([Member(name, 1.0)]) for name in NAMES]
GREEDY = Sampling(max_tokens=20, temperature=0, ignore_eos=True)
TEXT = prompts((12,), VOCAB_SIZE)[0]


def request(
    name: str,
    mix: Mix = BASE,
    prompt: tuple[int, ...] = TEXT,
    sampling: Sampling = GREEDY,
    **more: Any,
) -> Request:
    """A request that asks for twenty greedy tokens, unless told otherwise."""
    return Request(name, prompt, mix, sampling, **more)


def wanted(mix: Mix, prompt: tuple[int, ...] = TEXT, count: int = 20) -> list[int]:
    """The greedy tokens of the model with the mix added densely."""
    return generate(dense(MODEL, mix, ADAPTERS), prompt, count)


def error_of(messages: Sequence[Message]) -> EngineError:
    """The error of a request that must have failed."""
    final = messages[-1]
    assert isinstance(final, Failed), final
    return final.error


def weights_of(engine: Engine) -> list[torch.Tensor]:
    """Copies of the weights that fusing writes to."""
    return [p.weight.detach().clone() for p in engine._loop._runner._products.values()]


def packed_bytes() -> int:
    """Bytes in memory of one of the six; they are equal."""
    with running(tiny_model("llama"), ADAPTERS) as engine:
        ask(engine, request("size", MIXES[0]))
        (size,) = engine.resident().values()
    return size
