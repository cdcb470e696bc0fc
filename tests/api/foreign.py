"""Adapters of other libraries, made by them, and what the other library makes of them."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import ShiraConfig, get_peft_model
from transformers import AutoTokenizer

from tests.exchange.support import load

peft_sparta: Any = importlib.import_module("peft_sparta")  # it has no types

PROMPT = [7, 31, 100, 64, 201, 33, 90]
TOKENS = 12


@dataclass(frozen=True)
class Foreign:
    """A folder as the other library wrote it, and how its model continues `PROMPT`."""

    folder: Path
    text: str

    def files(self, *names: str) -> dict[str, bytes]:
        """Name → bytes; of all, or of those."""
        every = {path.name: path.read_bytes() for path in sorted(self.folder.iterdir())}
        return {name: every[name] for name in names or every}


def shira(base: Path, folder: Path, r: int = 4) -> Foreign:
    """PEFT's SHiRA on two weights of each layer."""
    config = ShiraConfig(r=r, target_modules=["q_proj", "down_proj"], random_seed=7)
    model = get_peft_model(load(base), config)
    _fill((w for name, w in model.named_parameters() if "shira_weight" in name), 0.3)
    model.save_pretrained(str(folder))
    return Foreign(folder, greedy(model.eval(), base))


def sparta(base: Path, folder: Path) -> Foreign:
    """peft-sparta on weights that are served: by itself it would also take an untied head."""
    torch.manual_seed(3)  # which entries it chooses
    frozen = ["embed_tokens", "lm_head", "mlp", "norm"]
    model = peft_sparta.SpaRTA(load(base), sparsity=0.98, frozen_modules=frozen)
    _fill(model.parameters(), 0.3)
    folder.mkdir()
    model.save(folder, merged=False)
    model.eval()
    return Foreign(folder, greedy(model, base))


@torch.no_grad()
def _fill(weights: Any, sigma: float) -> None:
    generator = torch.Generator().manual_seed(1)
    for weight in weights:
        weight.copy_(torch.randn(weight.shape, generator=generator) * sigma)


@torch.no_grad()
def greedy(model: Callable[..., Any], base: Path) -> str:
    """The most likely continuation of `PROMPT`."""
    tokens = list(PROMPT)
    for _ in range(TOKENS):
        logits = model(input_ids=torch.tensor([tokens])).logits
        tokens.append(int(logits[0, -1].argmax()))
    tokenizer = AutoTokenizer.from_pretrained(base)
    return str(tokenizer.decode(tokens[len(PROMPT) :], skip_special_tokens=True))
