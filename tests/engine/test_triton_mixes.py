"""Every row its own mix, on the Triton kernels: in the interpreter, and on a card."""

from __future__ import annotations

import pytest
import torch

from tests.engine.test_mixes import check_batch
from tests.tiny import ARCHS, tiny_model

#: Short prompts: the interpreter takes a tenth of a second a row. One is cut by the step's budget.
LENGTHS = (2, 3, 4, 2, 3, 4, 5, 2, 3, 20, 2, 3)

pytestmark = pytest.mark.usefixtures("interpreter")


# llama: all layers are short modules, which add the deltas' terms; qwen3: transformers' own.
@pytest.mark.parametrize(
    ("arch", "new_tokens"), [("llama", 3), pytest.param("qwen3", 3, marks=pytest.mark.gate)]
)
def test_interpret_every_row_gets_its_own_mix(
    arch: str, new_tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    check_batch(
        tiny_model(arch), 0.1, new_tokens, monkeypatch, LENGTHS,
        kernels="triton", max_step_tokens=48, max_mixed_step_tokens=40, queue_timeout=250,
    )  # fmt: skip


@pytest.mark.gpu
@pytest.mark.parametrize("arch", ARCHS)
def test_every_row_gets_its_own_mix_on_a_card(arch: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model(arch)
    torch.nn.Module.to(model, "cuda")
    check_batch(model, 0.1, 12, monkeypatch, kernels="triton")
