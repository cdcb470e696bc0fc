"""The order of the examples: whole passes, phases that go on, the same for every method."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gossamer.base.load import BaseFiles
from gossamer.training import TrainConfig, loop
from gossamer.training.order import Order, seen, updates
from tests.training.support import counting_examples, run_of, write_jsonl


@given(count=st.integers(1, 30), seed=st.integers(0, 1000), first=st.integers(0, 100))
def test_an_order_goes_on_where_another_one_ended(count: int, seed: int, first: int) -> None:
    whole: list[int] = []
    order = Order(count, seed)
    for epoch in range(first // count + 3):
        order.set_epoch(epoch)
        one = list(order)
        assert sorted(one) == list(range(count))
        whole += one
    later = Order(count, seed, first)
    assert list(later) == whole[first : first + count]
    later.set_epoch(1)
    assert list(later) == whole[first + count : first + 2 * count]


@given(
    examples=st.integers(1, 60), batch=st.integers(1, 9), accumulation=st.integers(1, 4),
    made=st.integers(0, 40),
)  # fmt: skip
def test_what_updates_see(examples: int, batch: int, accumulation: int, made: int) -> None:
    config = TrainConfig.of(
        data=Path(), parameters={}, batch_size=batch, gradient_accumulation=accumulation
    )
    rows: list[int] = []
    while len(rows) < made:
        sizes = [min(batch, examples - begin) for begin in range(0, examples, batch)]
        rows += [sum(sizes[i : i + accumulation]) for i in range(0, len(sizes), accumulation)]
        assert len(rows) % updates(config, examples, 1.0) == 0
    assert seen(config, examples, made) == sum(rows[:made])


@pytest.fixture
def seen_ids(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, list[int]]]:
    """The phase and the examples of each batch, by their first trained token's row."""
    batches: list[tuple[str, list[int]]] = []
    original = loop._PhaseTrainer.training_step

    def step(self: Any, model: Any, inputs: dict[str, Any], *rest: Any, **named: Any) -> Any:
        rows = [tuple(row[mask.bool()].tolist()) for row, mask in zip(
            inputs["input_ids"], inputs["attention_mask"], strict=True
        )]  # fmt: skip
        batches.append((self._phase.name, [hash(row) for row in rows]))
        return original(self, model, inputs, *rest, **named)

    monkeypatch.setattr(loop._PhaseTrainer, "training_step", step)
    return batches


def _of(batches: Sequence[tuple[str, list[int]]], phase: str = "") -> list[int]:
    return [row for name, rows in batches if name.startswith(phase) for row in rows]


def test_both_phases_of_mcs_together_are_one_pass(
    base: BaseFiles, tmp_path: Path, seen_ids: list[tuple[str, list[int]]]
) -> None:
    data = write_jsonl(tmp_path / "data.jsonl", counting_examples(24))
    parameters = {"warmup_steps": 1, "period": 1, "selection_epochs": 0.4, "keep_ratio": 0.2}
    settings: dict[str, Any] = {"batch_size": 4, "max_steps": 6}
    run_of(base, data, "mcs", parameters, **settings)
    mcs = list(seen_ids)
    assert {name for name, _ in mcs} == {"select", "train"}
    assert len(set(_of(mcs))) == len(_of(mcs)) == 24
    seen_ids.clear()
    run_of(base, data, "sparta", {"density": 0.05}, **settings)
    assert _of(seen_ids) == _of(mcs), "the same examples in the same order as another method"


def test_calibration_and_training_each_begin_with_the_first(
    base: BaseFiles, tmp_path: Path, seen_ids: list[tuple[str, list[int]]]
) -> None:
    data = write_jsonl(tmp_path / "data.jsonl", counting_examples(9))
    run_of(base, data, "lota", {"calibration_steps": 3}, batch_size=4, max_steps=6)
    calibrated, trained = _of(seen_ids, "calibrate"), _of(seen_ids, "train")
    assert calibrated == trained[:9]
    assert sorted(trained[9:]) == sorted(calibrated)
    assert trained[9:] != calibrated, "the second pass is shuffled anew"
