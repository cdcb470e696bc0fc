"""Padded and packed batches mean the same, and examples of a pack do not see each other."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from gossamer.base.load import BaseFiles
from gossamer.training.batches import IGNORED, collate, pack
from gossamer.training.data import read_examples
from gossamer.training.encode import Encoded, encode_examples
from gossamer.training.errors import ConfigError
from gossamer.training.trainee import Trainee, checkpointing
from tests.tiny import ARCHS, tiny_model, tiny_tokenizer
from tests.training.references import mean_loss
from tests.training.support import run_of, write_jsonl

#: of unequal length, and longer than the tiny models' sliding window
ROWS = [
    {"prompt": "Count 1:", "completion": " one two"},
    {"prompt": "She sells sea shells on the sea shore,", "completion": " three"},
    {"prompt": "What?", "completion": " Paris, and the shells that she sells."},
]


@pytest.fixture(scope="module")
def examples(tmp_path_factory: pytest.TempPathFactory) -> Sequence[Encoded]:
    file = write_jsonl(tmp_path_factory.mktemp("data") / "data.jsonl", ROWS)
    return encode_examples(read_examples(file), tiny_tokenizer(), 512).fitting


def losses_of(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """Of each trained token, in the order of the batch."""
    labels = batch["labels"]
    inputs = {name: tensor for name, tensor in batch.items() if name != "labels"}
    with torch.no_grad():
        logits = Trainee(model).logits(labels.shape[1], inputs)
    scored = labels != IGNORED
    return F.cross_entropy(logits[scored], labels[scored], reduction="none")


@pytest.mark.parametrize("arch", ARCHS)
def test_packing_equals_padding_equals_one_at_a_time(
    arch: str, examples: Sequence[Encoded]
) -> None:
    model = tiny_model(arch)
    packed, padded = losses_of(model, pack(examples)), losses_of(model, collate(examples, 0))
    torch.testing.assert_close(packed, padded, rtol=0, atol=1e-4)
    alone = torch.cat([losses_of(model, pack([example])) for example in examples])
    torch.testing.assert_close(packed, alone, rtol=0, atol=1e-4)
    assert float(packed.mean()) == pytest.approx(float(mean_loss(model, examples)), abs=1e-4)


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("corrupted", [0, 1, 2])
def test_examples_in_a_pack_do_not_see_each_other(
    arch: str, corrupted: int, examples: Sequence[Encoded]
) -> None:
    model = tiny_model(arch)
    other = list(examples)
    ids = (other[corrupted].ids + 7) % 300
    other[corrupted] = replace(other[corrupted], ids=ids)
    before, after = losses_of(model, pack(examples)), losses_of(model, pack(other))
    owner = np.concatenate([np.full(e.trained.sum(), i) for i, e in enumerate(examples)])
    mine = torch.from_numpy(owner == corrupted)
    torch.testing.assert_close(before[~mine], after[~mine], rtol=0, atol=1e-6)
    assert (before[mine] - after[mine]).abs().max() > 0.1
    # without positions that begin anew they would
    blind = pack(other)
    blind["position_ids"] = torch.arange(blind["input_ids"].numel())[None]
    if corrupted < 2:
        assert (losses_of(model, blind)[~mine] - before[~mine]).abs().max() > 1e-3


def test_a_pack_of_one_is_the_example(examples: Sequence[Encoded]) -> None:
    batch = pack([examples[1]])
    assert batch["input_ids"].tolist() == [examples[1].ids.tolist()]
    assert int((batch["labels"] != IGNORED).sum()) == int(examples[1].trained.sum())
    assert "attention_mask" not in batch


@pytest.mark.parametrize("method", ["sparta", "lota", "mcs"])
def test_a_run_learns_the_same_packed_and_padded(method: str, base: BaseFiles, data: Path) -> None:
    runs = [
        run_of(base, data, method, {"targets": "q,v"}, batch_size=4, max_steps=3, packing=packing,
               learning_rate=3e-4)
        for packing in (False, True)
    ]  # fmt: skip
    np.testing.assert_allclose(runs[0].losses, runs[1].losses, rtol=0, atol=1e-4)
    assert runs[0].tokens == runs[1].tokens


def test_accumulated_packs_are_one_batch(base: BaseFiles, data: Path) -> None:
    """Completions differ in length, so a mean of means would be another loss."""
    whole, parts = (
        run_of(base, data, "sparta", {"density": 0.05}, batch_size=size, max_steps=3, packing=True,
               gradient_accumulation=12 // size)
        for size in (12, 3)
    )  # fmt: skip
    np.testing.assert_allclose(whole.losses, parts.losses, rtol=1e-4)
    assert whole.tokens == parts.tokens


def trained_gradients(
    model: PreTrainedModel, batch: dict[str, Tensor], *, on: bool
) -> tuple[list[Tensor], int]:
    """Gradients of all linear weights, and the bytes that the forward pass has saved for them."""
    saved: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        saved[tensor.data_ptr()] = tensor.numel() * tensor.element_size()
        return tensor

    weights = [p for n, p in model.named_parameters() if n.endswith("_proj.weight")]
    for weight in weights:
        weight.requires_grad = True
    trainee = Trainee(model)
    with checkpointing(model, on=on):
        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            loss = trainee(**batch)["loss"]
        gradients = torch.autograd.grad(loss, weights)
    for weight in weights:
        weight.requires_grad = False
    own = {weight.data_ptr() for weight in model.parameters()}
    return list(gradients), sum(size for place, size in saved.items() if place not in own)


@pytest.mark.parametrize("arch", ["llama", "gemma2"])
def test_checkpointing_gives_the_same_gradients_and_saves_less(
    arch: str, examples: Sequence[Encoded]
) -> None:
    model = tiny_model(arch)
    modes = {name: module.training for name, module in model.named_modules()}
    config = model.config.to_dict()
    batch = collate([*examples] * 4, 0)
    plain, plain_bytes = trained_gradients(model, batch, on=False)
    again, kept_bytes = trained_gradients(model, batch, on=True)
    for one, other in zip(plain, again, strict=True):
        torch.testing.assert_close(one, other)
    assert kept_bytes < 0.5 * plain_bytes
    assert {name: module.training for name, module in model.named_modules()} == modes
    assert model.config.to_dict() == config
    assert not any("forward" in vars(module) for module in model.modules())
    assert not any(module._forward_hooks for module in model.modules())


@pytest.mark.parametrize("method", ["lota", "mcs"])
def test_a_checkpointed_run_is_the_same_run(method: str, base: BaseFiles, data: Path) -> None:
    plain, again = (
        run_of(base, data, method, {"targets": "q,v"}, max_steps=2, gradient_checkpointing=on)
        for on in (False, True)
    )
    np.testing.assert_allclose(plain.losses, again.losses, rtol=1e-5)


def test_checkpointing_that_the_architecture_lacks_is_refused() -> None:
    with (
        pytest.raises(ConfigError, match="Linear") as caught,
        checkpointing(nn.Linear(2, 2), on=True),
    ):
        pass
    assert caught.value.field == "gradient_checkpointing"
