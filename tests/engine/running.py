"""Help for tests that run a real engine on a real (tiny or SmolLM2) model."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from transformers import PreTrainedModel

from gossamer.engine.client import Engine
from gossamer.engine.config import EngineConfig
from gossamer.engine.messages import Chunk, Done, Failed, Message, Request
from gossamer.store.delta import DeltaSet
from tests.tiny import tiny_tokenizer

TOKENIZER = tiny_tokenizer()


def started(
    model: PreTrainedModel,
    adapters: Mapping[str, DeltaSet] | None = None,
    tokenizer: Any = TOKENIZER,
    **config: Any,
) -> Engine:
    """A started engine over `model` that loads adapters from a mapping by digest."""
    settings = EngineConfig(**{"memory_bytes": 64 << 20, **config})
    source = {} if adapters is None else adapters
    engine = Engine(model, tokenizer, source.__getitem__, settings, fingerprint="test")
    engine.start()
    return engine


@contextmanager
def running(
    model: PreTrainedModel, adapters: Mapping[str, DeltaSet] | None = None, **settings: Any
) -> Iterator[Engine]:
    """An engine as `started` makes it, closed at the end; it must have let go of everything."""
    engine = started(model, adapters, **settings)
    try:
        yield engine
    finally:
        engine.close()
        engine._memory.check_integrity()
        assert engine._memory.pages.held == 0, "a request left without its pages"
        pinned = [e.key for e in engine._memory._entries.values() if e.pins]
        assert not pinned, f"a request left without unpinning {pinned}"
        if engine._loop.dead is not None:
            raise engine._loop.dead


def tokens_of(messages: Sequence[Message], index: int = 0) -> list[int]:
    """The tokens of one choice; the request must have been answered."""
    assert isinstance(messages[-1], Done), messages[-1]
    return [t for m in messages if isinstance(m, Chunk) and m.index == index for t in m.token_ids]


def text_of(messages: Sequence[Message], index: int = 0) -> str:
    """The text of one choice."""
    return "".join(m.text for m in messages if isinstance(m, Chunk) and m.index == index)


def ask(engine: Engine, *requests: Request) -> list[list[Message]]:
    """Run requests together; each must have exactly one final message, the last."""
    answers = engine.generate(requests)
    for messages in answers:
        assert [isinstance(m, Done | Failed) for m in messages].count(True) == 1
    return answers


def prompts(lengths: Sequence[int], vocab_size: int, seed: int = 1) -> list[tuple[int, ...]]:
    """Random prompts without special tokens."""
    generator = torch.Generator().manual_seed(seed)
    return [
        tuple(torch.randint(3, vocab_size, (n,), generator=generator).tolist()) for n in lengths
    ]


def generate(model: PreTrainedModel, prompt: tuple[int, ...], count: int) -> list[int]:
    """What transformers' own `generate` says, greedily, alone."""
    ids = torch.tensor([prompt])
    with torch.inference_mode():
        out = model.generate(  # type: ignore[operator]
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=count,
            min_new_tokens=count,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
        )
    new: list[int] = out[0, len(prompt) :].tolist()
    return new
