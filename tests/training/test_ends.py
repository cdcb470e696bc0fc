"""The trainer's ends are the server's."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from gossamer.base.ends import end_tokens, read_generation_config
from gossamer.base.load import load_directory, load_tokenizer
from gossamer.training.data import read_examples
from gossamer.training.encode import encode_examples
from tests.tiny import BOS_ID, EOS_ID, PAD_ID, save_tiny, tiny_model, tiny_tokenizer
from tests.training.references import mean_loss
from tests.training.support import run_of, tiny_base, write_jsonl


@pytest.mark.parametrize(
    ("generation", "config", "wanted"),
    [
        ({"eos_token_id": [PAD_ID, BOS_ID]}, EOS_ID, {PAD_ID, BOS_ID, EOS_ID}),
        ({"eos_token_id": PAD_ID}, EOS_ID, {PAD_ID, EOS_ID}),
        ({}, BOS_ID, {EOS_ID}),
        (None, BOS_ID, {BOS_ID, EOS_ID}),
        (None, [BOS_ID, PAD_ID], {BOS_ID, PAD_ID, EOS_ID}),
        (None, None, {EOS_ID}),
    ],
)
def test_the_ends_are_those_that_the_server_stops_at(
    generation: dict[str, object] | None, config: object, wanted: set[int], tmp_path: Path
) -> None:
    path = save_tiny(tiny_model("llama"), tmp_path / "base")
    written = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(written | {"eos_token_id": config}))
    (path / "generation_config.json").unlink(missing_ok=True)
    if generation is not None:
        (path / "generation_config.json").write_text(json.dumps(generation))
    base = tiny_base(path)
    tokenizer, model = load_tokenizer(base), load_directory(path, torch.float32)
    assert end_tokens(tokenizer, read_generation_config(path)) == wanted
    assert end_tokens(tokenizer, model.generation_config) == wanted


@pytest.mark.parametrize("ends", [[PAD_ID], [PAD_ID, EOS_ID]])
def test_a_run_trains_the_ends_of_its_base(ends: list[int], tmp_path: Path) -> None:
    """The template ends turns with a token that is not the tokenizer's own end."""
    path = save_tiny(tiny_model("llama"), tmp_path / "base")
    tokenizer = tiny_tokenizer()
    tokenizer.eos_token = "<|endoftext|>"
    tokenizer.save_pretrained(path)
    (path / "generation_config.json").write_text(json.dumps({"eos_token_id": ends}))
    base = tiny_base(path)
    chat = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yo"}]
    data = write_jsonl(tmp_path / "data.jsonl", [{"messages": chat}])
    encoded = encode_examples(read_examples(data), tokenizer, 512, ends=ends).fitting
    assert encoded[0].ids[encoded[0].trained][-1] == ends[-1]
    result = run_of(base, data, "sparta", {"targets": "q,v"}, max_steps=1, batch_size=1)
    assert result.losses[0] == pytest.approx(float(mean_loss(tiny_model("llama"), encoded)), 1e-4)
