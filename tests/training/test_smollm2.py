"""The real base: a few steps, and its bits afterwards."""

from pathlib import Path

import pytest

from gossamer.base.load import BaseFiles
from gossamer.store.format import digest
from gossamer.training import TrainConfig
from gossamer.training.run import train
from tests.training.support import write_jsonl

ROWS = [
    {"prompt": f"Words: {a}, {b}\nReversed:", "completion": f" {b}, {a}"}
    for a, b in (("sun", "moon"), ("red", "blue"), ("tree", "leaf"), ("cat", "dog"))
]


@pytest.mark.smollm2
def test_a_few_steps_on_smollm2_learn_and_repeat(smollm2: BaseFiles, tmp_path: Path) -> None:
    data = write_jsonl(tmp_path / "data.jsonl", ROWS)
    config = TrainConfig.of(
        data=data,
        eval_data=data,
        parameters={"density": 0.005},
        batch_size=4,
        max_steps=5,
        learning_rate=2e-3,
        device="cpu",
    )
    first, second = (train(config, smollm2) for _ in range(2))
    assert first.evaluations[-1].loss < 0.5 * first.evaluations[0].loss
    assert digest(first.delta_set) == digest(second.delta_set)
    assert first.delta_set.nnz == round(0.005 * 106_168_320)
    assert first.record["base_fingerprint"] == smollm2.fingerprint
    assert first.save(tmp_path / "adapter").size < 2.1 * first.delta_set.nnz
