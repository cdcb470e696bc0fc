"""Exact match against real greedy generation, and where the figures of an evaluation go."""

from __future__ import annotations

import copy
import csv
import io
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from transformers import PreTrainedModel

from gossamer.base.load import BaseFiles, load_model, load_tokenizer
from gossamer.training import TrainConfig
from gossamer.training.data import read_examples
from gossamer.training.encode import Encoded, encode_examples
from gossamer.training.run import train
from gossamer.training.trainee import Outcome, Trainee, evaluate, outcomes
from tests.training.support import counting_examples, run_of, write_jsonl
from tests.worker.support import TENANT, planted

PAD = 0
#: nothing that the training file teaches
UNKNOWN = [
    {"prompt": f"Say {i}:", "completion": f" {word}" * (1 + i % 3)}
    for i, word in enumerate(("sea", "Paris", "weights", "shells", "base", "ten", "one"))
]


@pytest.fixture(scope="module")
def held_out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of different lengths: those that a trained model knows, among those that it does not."""
    known, rows = counting_examples(12), list(UNKNOWN)
    for i, row in enumerate(known):
        rows.insert(2 * i, row)
    return write_jsonl(tmp_path_factory.mktemp("held") / "held.jsonl", rows)


@pytest.fixture(scope="module")
def examples(base: BaseFiles, held_out: Path) -> Sequence[Encoded]:
    return encode_examples(read_examples(held_out), load_tokenizer(base), 512).fitting


@pytest.fixture(scope="module")
def model(base: BaseFiles, data: Path) -> PreTrainedModel:
    """Trained until it counts."""
    run = run_of(
        base, data, "sparta", {"density": 0.1}, max_steps=25, value_dtype="F32",
    )  # fmt: skip
    found = load_model(base)
    with torch.no_grad():
        for name, delta in run.delta_set.deltas.items():
            found.get_parameter(name).add_(torch.from_numpy(delta.dense()))
    return found


@torch.no_grad()
def decoded_exactly(model: PreTrainedModel, example: Encoded) -> bool:
    """Whether greedy generation gives every completion, each after the true text before it."""
    borders = np.flatnonzero(np.diff(np.concatenate([[False], example.trained, [False]])))
    for begin, end in borders.reshape(-1, 2).tolist():
        prompt, wanted = example.ids[:begin], example.ids[begin:end]
        ids = torch.from_numpy(prompt)[None]
        made: Any = model.generate(  # type: ignore[operator]
            input_ids=ids, attention_mask=torch.ones_like(ids), do_sample=False,
            max_new_tokens=len(wanted),
        )  # fmt: skip
        if made[0, begin:].tolist() != wanted.tolist():
            return False
    return True


def measured(
    model: PreTrainedModel, examples: Sequence[Encoded], data: Path, **settings: Any
) -> list[Outcome]:
    config = TrainConfig.of(data=data, **{"batch_size": 5, **settings})
    return outcomes(config, Trainee(model), examples, PAD)


def exact(found: Sequence[Outcome]) -> list[bool]:
    return [one.exact for one in found]


@pytest.fixture(scope="module")
def decoded(model: PreTrainedModel, examples: Sequence[Encoded]) -> list[bool]:
    found = [decoded_exactly(model, example) for example in examples]
    assert 3 < sum(found) < len(found) - 3
    return found


@pytest.mark.parametrize(
    "settings",
    [
        {"batch_size": 1},
        {"batch_size": 3},
        {"batch_size": 64},
        {"batch_size": 3, "gradient_accumulation": 4},
        {"batch_size": 5, "packing": True},
    ],
    ids=["one", "three", "all", "accumulated", "packed"],
)
def test_exact_match_is_what_greedy_generation_gets_right(
    settings: dict[str, Any], model: PreTrainedModel, examples: Sequence[Encoded],
    decoded: list[bool], data: Path,
) -> None:  # fmt: skip
    assert exact(measured(model, examples, data, **settings)) == decoded
    config = TrainConfig.of(data=data, **settings)
    share = evaluate(config, Trainee(model), examples, PAD, 7).exact_match
    assert share == sum(decoded) / len(decoded)


def test_another_model_gets_others_right(
    base: BaseFiles, model: PreTrainedModel, examples: Sequence[Encoded], decoded: list[bool],
    data: Path,
) -> None:  # fmt: skip
    assert not any(exact(measured(load_model(base), examples, data)))
    known = decoded.index(True)
    used = [int(examples[known].ids[-2]), PAD]
    spoiled = copy.deepcopy(model)
    with torch.no_grad():
        head = spoiled.get_output_embeddings().weight
        head[used] = head[used[::-1]]
    found = exact(measured(spoiled, examples, data))
    assert not found[known]
    assert found == [decoded_exactly(spoiled, example) for example in examples] != decoded


def test_one_wrong_token_is_no_match_the_last_one_too(
    model: PreTrainedModel, examples: Sequence[Encoded], decoded: list[bool], data: Path
) -> None:
    known = [example for example, right in zip(examples, decoded, strict=True) if right]
    example = max(known, key=lambda one: int(one.trained.sum()))
    completion = np.flatnonzero(example.trained)
    assert example.ids[completion[-1]] == model.config.eos_token_id
    for place in completion.tolist():
        ids = example.ids.copy()
        ids[place] = ids[place] + 1 if ids[place] < 300 else 3
        wrong = Encoded(ids, example.trained)
        (found,) = measured(model, [wrong], data)
        assert not found.exact
        assert found.right < found.tokens == completion.size
        assert not decoded_exactly(model, wrong)
    assert measured(model, [example], data)[0].exact


def test_every_answer_of_a_conversation_has_to_match(
    model: PreTrainedModel, examples: Sequence[Encoded], decoded: list[bool], data: Path
) -> None:
    """Each after the true ones before it."""
    known = [example for example, right in zip(examples, decoded, strict=True) if right]
    unknown = [example for example, right in zip(examples, decoded, strict=True) if not right]
    talks = [
        Encoded(np.concatenate([a.ids, b.ids]), np.concatenate([a.trained, b.trained]))
        for a, b in [(known[0], known[1]), (unknown[0], known[0]), (known[2], known[0]),
                     (known[1], unknown[1]), (known[0], known[0])]
    ]  # fmt: skip
    expected = [decoded_exactly(model, talk) for talk in talks]
    assert exact(measured(model, talks, data)) == expected
    assert set(expected) == {True, False}


def test_an_outcome_is_that_of_the_example_alone(
    model: PreTrainedModel, examples: Sequence[Encoded], data: Path
) -> None:
    """Not of its batch: bootstrap intervals draw examples."""
    found = measured(model, examples, data, batch_size=4)
    for example, one in zip(examples, found, strict=True):
        ids, trained = torch.from_numpy(example.ids), torch.from_numpy(example.trained)[1:]
        with torch.no_grad():
            logits = model(input_ids=ids[None]).logits[0, :-1][trained]
        wanted = ids[1:][trained]
        assert one.loss == pytest.approx(float(F.cross_entropy(logits, wanted, reduction="sum")),
                                         rel=1e-4, abs=1e-5)  # fmt: skip
        assert one.tokens == wanted.numel()
        assert one.right == int((logits.argmax(-1) == wanted).sum())
    config = TrainConfig.of(data=data, batch_size=4)
    whole = evaluate(config, Trainee(model), examples, PAD, 3)
    tokens = sum(one.tokens for one in found)
    assert whole.loss == pytest.approx(sum(one.loss for one in found) / tokens)
    assert whole.token_accuracy == sum(one.right for one in found) / tokens
    assert (whole.step, whole.tokens) == (3, tokens)
    other = [replace(one, right=one.tokens) for one in found]
    assert sum(exact(other)) > sum(exact(found))


def test_a_run_measures_its_adapter(
    base: BaseFiles, data: Path, held_out: Path, examples: Sequence[Encoded]
) -> None:
    """The figure that a run ends with is that of the base with its adapter in it."""
    run = run_of(
        base, data, "sparta", {"density": 0.1}, max_steps=15, value_dtype="F32",
        eval_data=held_out, packing=True, gradient_accumulation=2, batch_size=4,
    )  # fmt: skip
    patched = load_model(base)
    with torch.no_grad():
        for name, delta in run.delta_set.deltas.items():
            patched.get_parameter(name).add_(torch.from_numpy(delta.dense()))
    decoded = [decoded_exactly(patched, example) for example in examples]
    before, after = run.evaluations
    assert before.exact_match < after.exact_match == sum(decoded) / len(decoded) < 1
    assert [row["exact_match"] for row in run.record["evaluations"]] == [
        before.exact_match, after.exact_match,
    ]  # fmt: skip


def test_checkpoints_carry_it(base: BaseFiles, data: Path, held_out: Path) -> None:
    kept: list[dict[str, float]] = []
    config = TrainConfig.of(
        data=data, eval_data=held_out, max_steps=6, batch_size=8, learning_rate=1e-2,
        eval_steps=2, checkpoint_steps=2, device="cpu",
    )  # fmt: skip
    run = train(
        config, base, model=load_model(base), keep=lambda step, made, metrics: kept.append(
            dict(metrics)
        ),
    )  # fmt: skip
    assert [metrics["valid_exact_match"] for metrics in kept] == [
        evaluation.exact_match for evaluation in run.evaluations[1:-1]
    ]


def test_a_job_tells_it(tmp_path: Path, tiny_dir: Callable[..., Path]) -> None:
    """In its events, of its checkpoints, and in a column behind OpenAI's of the result file."""
    with planted(tmp_path / "data", tiny_dir("llama")) as plant:
        settings = {
            "eval_fraction": 0.25, "max_steps": 25, "eval_steps": 10, "checkpoint_steps": 10,
        }  # fmt: skip
        job = plant.submit("sparta", {"density": 0.1}, settings=settings)
        assert plant.work() == 1
        done = plant.get(job)
        assert done.status == "succeeded"
        events = plant.backlog.events(TENANT, job.id, limit=1000, order="asc").items
        told = [event.data for event in events if event.data and "valid_loss" in event.data]
        assert [data["step"] for data in told] == [0, 10, 20, 25]
        checkpoints = plant.backlog.checkpoints(TENANT, job.id, limit=100, order="asc").items
        record = plant.store.catalog.open(done.digest or "").record
        with plant.store.files.content(TENANT, done.result_files[0]) as path:
            rows = list(csv.DictReader(io.StringIO(path.read_text())))
    shares = [data["valid_exact_match"] for data in told]
    assert len(set(shares)) > 1
    assert shares == [row["exact_match"] for row in record["evaluations"]]
    assert [row["valid_exact_match"] for row in rows if row["valid_loss"]] == list(map(str, shares))
    assert list(rows[0])[-1] == "valid_exact_match"
    assert [one.metrics["valid_exact_match"] for one in checkpoints] == shares[1:3]
