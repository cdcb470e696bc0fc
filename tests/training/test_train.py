"""Whole runs on tiny models: they learn, repeat themselves, and leave the base as it was."""

import io
import json
import os
import random
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from gossamer.base.fingerprint import fingerprint
from gossamer.base.load import BaseFiles, load_model, load_tokenizer
from gossamer.base.patch_map import adapter_table
from gossamer.jobs.methods import MethodParameters, SpartaParameters
from gossamer.store.format import digest, inspect, open_validated, seeded_positions
from gossamer.training import (
    Evaluation,
    Silent,
    Started,
    Step,
    TrainConfig,
    TrainingError,
)
from gossamer.training import train as lazy_train
from gossamer.training.errors import (
    BaseChangedError,
    ConfigError,
    DataError,
    DivergedError,
    UnknownMethodError,
)
from gossamer.training.order import updates
from gossamer.training.run import TrainResult, train
from tests.tiny import ARCHS, tiny_tokenizer
from tests.training.support import Recorder, counting_examples, short_run, tiny_base, write_jsonl

TinyDir = Callable[..., Path]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_jsonl(tmp_path_factory.mktemp("data") / "data.jsonl", counting_examples())


@pytest.fixture(scope="module")
def result(base: BaseFiles, data: Path) -> TrainResult:
    return short_run(base, data, eval_data=data, max_steps=30)


@pytest.mark.parametrize("arch", ARCHS)
def test_every_architecture_learns_and_keeps_its_bits(
    arch: str, tiny_dir: TinyDir, data: Path
) -> None:
    base = tiny_base(tiny_dir(arch))
    model = load_model(base)
    modules, config = dict(model.named_modules()), model.config.to_dict()
    settings = TrainConfig.of(
        data=data,
        eval_data=data,
        parameters={"density": 0.1, "of": "targets"},
        max_steps=25,
        batch_size=8,
        learning_rate=1e-2,
    )
    result = train(settings, base, model=model)
    first, last = result.evaluations
    assert last.loss < 0.5 * first.loss
    assert fingerprint(model) == base.fingerprint
    assert dict(model.named_modules()) == modules
    assert model.config.to_dict() == config
    assert not model.training
    assert not any(parameter.requires_grad for parameter in model.parameters())
    if arch == "phi3":
        assert any("qkv_proj" in name for name in result.delta_set.deltas)


def test_the_adapter_is_what_was_trained(result: TrainResult, base: BaseFiles, data: Path) -> None:
    """Added densely to the base, it has the loss that the run reported, and without it, not."""
    model = load_model(base)
    settings = TrainConfig.of(data=data, eval_data=data, max_steps=1, learning_rate=1e-30)
    untouched = train(settings, base, model=model).evaluations[0]
    with torch.no_grad():
        for name, delta in result.delta_set.deltas.items():
            model.get_parameter(name).add_(torch.from_numpy(delta.dense()))
    patched = train(settings, base, model=model).evaluations[0]
    last = result.evaluations[-1]
    assert patched.loss == pytest.approx(last.loss, rel=0.02)  # bf16 values
    assert patched.token_accuracy >= last.token_accuracy - 0.05
    assert untouched.loss == pytest.approx(result.evaluations[0].loss, rel=1e-5)
    assert untouched.loss > 1.5 * last.loss


def test_two_runs_are_one_adapter_byte_for_byte(base: BaseFiles, data: Path) -> None:
    files, digests = [], []
    for _ in range(2):
        random.seed()
        torch.rand(3)
        run = short_run(base, data, eval_fraction=0.25)
        stream = io.BytesIO()
        files.append((run.save(stream).blob_id, stream.getvalue()))
        digests.append(digest(run.delta_set))
    assert files[0] == files[1]
    assert digests[0] == digests[1]
    assert digest(short_run(base, data, eval_fraction=0.25, seed=1).delta_set) != digests[0]


def test_the_file_stores_a_seed_and_reads_back_the_same(
    result: TrainResult, base: BaseFiles, tmp_path: Path
) -> None:
    written = result.save(tmp_path / "adapter")
    table = adapter_table(load_model(base))
    back = open_validated(tmp_path / "adapter", table, base_fingerprint=base.fingerprint)
    assert digest(back) == digest(result.delta_set)
    assert back.record == result.record
    codings = {row.coding for row in inspect(tmp_path / "adapter").modules}
    assert codings == {"seed+planes"}
    for name, delta in back.deltas.items():
        again = seeded_positions(result.seeds[name], name, delta.dense().size, delta.nnz)
        np.testing.assert_array_equal(delta.positions, again)
    bare = result.delta_set.nnz * 2
    assert written.size < bare + 8000  # the values, the record and a header; no positions


def test_the_optimiser_holds_only_the_values(
    base: BaseFiles, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[torch.optim.Optimizer] = []
    original = torch.optim.AdamW.__init__

    def spy(self: torch.optim.AdamW, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **kwargs)
        made.append(self)

    monkeypatch.setattr(torch.optim.AdamW, "__init__", spy)
    run = short_run(base, data, max_steps=2)
    (optimiser,) = made
    held = sum(
        tensor.numel()
        for state in optimiser.state.values()
        for tensor in state.values()
        if tensor.dim() > 0
    )
    assert held == 2 * run.delta_set.nnz  # Adam's two moments


def test_the_record_says_how_it_came_to_be(
    result: TrainResult, base: BaseFiles, data: Path
) -> None:
    record = result.record
    json.dumps(record, allow_nan=False)
    assert record["method"] == "sparta"
    assert record["density"]["nnz"] == result.delta_set.nnz
    assert record["density"]["of"] == "model"
    assert record["density"]["of_model"] == pytest.approx(0.05, abs=1e-4)
    assert record["density"]["of_targets"] > record["density"]["of_model"]
    assert record["base_fingerprint"] == base.fingerprint == result.delta_set.base_fingerprint
    assert record["steps"] == len(result.losses) == 30
    assert record["loss"]["first"] == result.losses[0]
    assert record["loss"]["last"] == result.losses[-1]
    assert record["versions"]["torch"] == torch.__version__
    assert record["data"]["digest"].startswith("sha256:")
    assert record["hyper_parameters"]["learning_rate"] == 1e-2
    assert record["value_dtype"] == "BF16"
    assert str(data.parent) not in json.dumps(record)


def test_rounding_to_bf16_is_reported_and_fp32_loses_nothing(
    result: TrainResult, base: BaseFiles, data: Path
) -> None:
    assert 0 < result.rounding.relative_error < 2**-8
    exact = short_run(base, data, value_dtype="F32", max_steps=3)
    assert exact.rounding.relative_error == 0
    assert {delta.value_dtype for delta in exact.delta_set.deltas.values()} == {"F32"}


def test_watchers_are_told_everything_in_order(base: BaseFiles, data: Path) -> None:
    watcher = Recorder()
    config = TrainConfig.of(
        data=data, parameters={"density": 0.02}, eval_fraction=0.25, eval_steps=2, max_steps=4
    )
    lazy_train(config, base, model=load_model(base), watcher=watcher)
    kinds = [type(event) for event in watcher.events]
    assert kinds == [Started, Evaluation, Step, Step, Evaluation, Step, Step, Evaluation]
    started, steps = watcher.events[0], [e for e in watcher.events if isinstance(e, Step)]
    assert (started.steps, started.examples, started.held_out) == (4, 18, 6)
    assert started.learning_rate == 5e-3  # the default's upper end, for so small a model
    assert [step.step for step in steps] == [1, 2, 3, 4]
    assert [step.nnz for step in steps] == [started.density.nnz] * 4
    assert steps[0].tokens < steps[-1].tokens
    assert steps[-1].eta == 0
    assert all(step.memory > 1 << 20 and step.tokens_per_second > 0 for step in steps)
    assert [e.step for e in watcher.events if isinstance(e, Evaluation)] == [0, 2, 4]


def test_nothing_is_left_behind(
    base: BaseFiles,
    data: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)
    environment, states = dict(os.environ), (random.getstate(), torch.get_rng_state())
    short_run(base, data, max_steps=3)
    assert list(tmp_path.iterdir()) == []
    assert dict(os.environ) == environment
    assert random.getstate() == states[0]
    assert torch.equal(torch.get_rng_state(), states[1])
    assert capfd.readouterr() == ("", "")


def test_accumulation_gives_the_loss_of_the_whole_batch(base: BaseFiles, data: Path) -> None:
    whole = short_run(base, data, batch_size=12, max_steps=4, value_dtype="F32")
    parts = short_run(
        base, data, batch_size=3, gradient_accumulation=4, max_steps=4, value_dtype="F32"
    )
    np.testing.assert_allclose(whole.losses, parts.losses, rtol=1e-3)
    other = short_run(base, data, batch_size=3, max_steps=4)
    assert not np.allclose(whole.losses, other.losses, rtol=1e-3)


def test_16_bit_products_reach_the_same_place(base: BaseFiles, data: Path) -> None:
    exact = short_run(base, data, max_steps=20)
    narrow = short_run(base, data, max_steps=20, precision="bf16")
    assert narrow.losses != exact.losses
    np.testing.assert_allclose(narrow.losses, exact.losses, rtol=0.15, atol=0.15)


@pytest.mark.parametrize("arch", ["llama", "gemma2"])  # gemma2 cannot run with fused attention
def test_the_base_is_loaded_when_it_is_not_given(arch: str, tiny_dir: TinyDir, data: Path) -> None:
    base = tiny_base(tiny_dir(arch))
    parameters = SpartaParameters(density=0.02, of="targets")
    config = TrainConfig.of(data=data, parameters=parameters, max_steps=2, device="auto")
    loaded = train(config, base)
    given = train(config, base, model=load_model(base), tokenizer=load_tokenizer(base))
    np.testing.assert_allclose(loaded.losses, given.losses, rtol=1e-4)


def test_a_16_bit_base_is_not_written(tiny_dir: TinyDir, data: Path, tmp_path: Path) -> None:
    model = load_model(tiny_base(tiny_dir("llama")), torch.bfloat16)
    model.save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    base = tiny_base(tmp_path)
    run = TrainConfig.of(
        data=data,
        eval_data=data,
        parameters={"density": 0.05},
        max_steps=20,
        learning_rate=1e-2,
        precision="bf16",
        device="cpu",
    )
    versions = [parameter._version for parameter in model.parameters()]
    result = train(run, base, model=model)
    assert [parameter._version for parameter in model.parameters()] == versions
    assert result.evaluations[-1].loss < 0.7 * result.evaluations[0].loss
    assert train(run, base).losses == pytest.approx(result.losses, rel=0.05, abs=0.05)


def test_parameters_of_another_method_are_refused(data: Path) -> None:
    with pytest.raises(ConfigError, match="parameters"):
        TrainConfig.of(data=data, parameters=MethodParameters())


def test_a_run_that_diverges_is_stopped_and_the_base_is_whole(base: BaseFiles, data: Path) -> None:
    model = load_model(base)
    config = TrainConfig.of(
        data=data, max_steps=60, learning_rate=10, learning_rate_multiplier=1e3, warmup=0,
        batch_size=4,
    )  # fmt: skip
    with pytest.raises(DivergedError) as caught:
        train(config, base, model=model)
    assert caught.value.learning_rate == pytest.approx(1e4, rel=0.2)
    assert fingerprint(model) == base.fingerprint


def test_a_changed_base_is_noticed(
    base: BaseFiles, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gossamer.training.sparse.SparseLinear.restore", lambda self: None)
    with pytest.raises(BaseChangedError) as caught:
        short_run(base, data, max_steps=2)
    assert caught.value.before == base.fingerprint != caught.value.after


def test_a_watcher_that_raises_ends_the_run_and_the_base_is_whole(
    base: BaseFiles, data: Path
) -> None:
    class Stop(Silent):
        def stepped(self, event: Step) -> None:
            raise KeyboardInterrupt

    model = load_model(base)
    with pytest.raises(KeyboardInterrupt):
        train(TrainConfig.of(data=data, max_steps=3), base, model=model, watcher=Stop())
    assert fingerprint(model) == base.fingerprint
    assert all(isinstance(model.get_submodule(n), nn.Linear) for n, _ in linears(model))


def linears(model: nn.Module) -> list[tuple[str, nn.Module]]:
    return [(n, m) for n, m in model.named_modules() if n.endswith("_proj")]


@pytest.mark.parametrize(
    ("settings", "steps"),
    [
        ({"epochs": 1}, 3),
        ({"epochs": 0.5}, 2),
        ({"epochs": 2.5}, 8),
        ({"epochs": 2, "gradient_accumulation": 2}, 4),
        ({"epochs": 5, "max_steps": 1}, 1),
    ],
)
def test_epochs_become_steps(
    base: BaseFiles, data: Path, settings: dict[str, Any], steps: int
) -> None:
    config = TrainConfig.of(data=data, batch_size=8, **settings)
    if config.max_steps is None:
        assert updates(config, 24, config.epochs) == steps
    run = train(config, base, model=load_model(base), tokenizer=load_tokenizer(base))
    assert len(run.losses) == steps


@pytest.mark.parametrize(
    ("settings", "field"),
    [
        ({"parameters": {"density": 0}}, "parameters.density"),
        ({"parameters": {"densty": 0.1}}, "parameters.densty"),
        ({"parameters": {"of": "everything"}}, "parameters.of"),
        ({"batch_size": 0}, "batch_size"),
        ({"learning_rate": -1}, "learning_rate"),
        ({"rate": 1}, "rate"),
        ({"seed": -1}, "seed"),
        ({"eval_fraction": 0.1, "eval_data": "x"}, "eval_fraction"),
    ],
)
def test_a_setting_that_cannot_be_is_named(
    data: Path, settings: dict[str, Any], field: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        TrainConfig.of(data=data, **settings)
    assert caught.value.field == field
    assert field in str(caught.value)


def test_an_unknown_method_lists_the_known_ones(data: Path) -> None:
    with pytest.raises(UnknownMethodError, match="sparta"):
        TrainConfig.of(data=data, method="magic")


def test_a_held_out_share_that_rounds_to_nothing_is_refused(base: BaseFiles, data: Path) -> None:
    with pytest.raises(ConfigError, match="eval_fraction"):
        short_run(base, data, eval_fraction=0.001)


def test_a_bad_file_is_found_before_the_model_is_loaded(tmp_path: Path) -> None:
    missing = BaseFiles("nowhere", tmp_path / "nowhere", "0" * 64)
    file = write_jsonl(tmp_path / "data.jsonl", [{"prompt": "a"}])
    config = TrainConfig.of(data=file)
    with pytest.raises(DataError) as caught:
        train(config, missing, tokenizer=tiny_tokenizer())
    assert isinstance(caught.value, TrainingError)
    assert (caught.value.line, caught.value.field) == (1, "completion")


def test_importing_the_room_brings_no_torch() -> None:
    code = (
        "import sys, gossamer.training as t; t.TrainConfig.of(data='x');"
        "print(sorted({'torch', 'transformers'} & set(sys.modules)))"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"
