"""The base between two jobs: loaded once, given up when a run may have left it changed."""

from __future__ import annotations

import gc
import logging
import threading
import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from gossamer.base.load import load_model
from gossamer.jobs.backlog import Backlog
from gossamer.store.catalog.opening import Store
from gossamer.store.format import digest
from gossamer.training import TrainConfig, loading
from gossamer.training.attempt import Attempt
from gossamer.training.dense import DenseLinear
from gossamer.training.errors import BaseChangedError, ConfigError, StoppedError
from gossamer.training.loading import LoadedBase
from gossamer.training.run import train
from gossamer.training.sparse import SparseLinear
from gossamer.training.worker import Worker
from tests.tiny import save_tiny, tiny_model
from tests.training.support import counting_examples, tiny_base, write_jsonl
from tests.worker.support import SETTINGS, Plant, planted

#: Methods that write into the weights, that do not, and that do both.
METHODS: list[tuple[str, dict[str, Any]]] = [
    ("lota", {"sparsity": 0.9}),
    ("sparta", {"density": 0.05}),
    ("mcs", {"keep_ratio": 0.1, "period": 2, "block_size": 8}),
    ("sparta", {"density": 0.05}),
]
#: Tensors, and what holds those that are trained.
TENSORS = (torch.Tensor, SparseLinear, DenseLinear)


@pytest.fixture
def plant(tmp_path: Path, tiny_dir: Callable[..., Path]) -> Iterator[Plant]:
    with planted(tmp_path / "data", tiny_dir("llama")) as made:
        yield made


class Loads:
    """Every model that was loaded, as long as somebody needs it.

    `alive` tells how many of them there were at each load.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.models: list[weakref.ref[PreTrainedModel]] = []
        self.alive: list[int] = []
        monkeypatch.setattr(loading, "load_model", self._load)

    def _load(self, *args: Any, **kwargs: Any) -> PreTrainedModel:
        gc.collect()
        self.alive.append(sum(one() is not None for one in self.models))
        model = load_model(*args, **kwargs)
        self.models.append(weakref.ref(model))
        return model

    @property
    def newest(self) -> PreTrainedModel:
        model = self.models[-1]()
        assert model is not None
        return model


@pytest.fixture
def loads(monkeypatch: pytest.MonkeyPatch) -> Loads:
    return Loads(monkeypatch)


def alone(plant: Plant, data: Path, method: str, parameters: dict[str, Any]) -> str:
    """The digest of a run with a model of its own."""
    chosen = {"method": method, "parameters": parameters, "seed": 5, **SETTINGS}
    write_jsonl(data, counting_examples())
    return digest(train(TrainConfig.of(data=data, **chosen), plant.base).delta_set)


def test_jobs_share_the_base_and_make_what_runs_make(
    plant: Plant, loads: Loads, tmp_path: Path
) -> None:
    jobs = [plant.submit(*one, suffix=f"made-{i}") for i, one in enumerate(METHODS)]
    assert plant.work() == len(jobs)
    assert len(loads.models) == 1
    for job, one in zip(jobs, METHODS, strict=True):
        done = plant.get(job)
        assert (done.status, done.digest) == ("succeeded", alone(plant, tmp_path / "d", *one))


def spoil_embedding(loads: Loads, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first run changes a weight that nobody restores."""
    started = Attempt.started
    spoiled: list[bool] = []

    def spoil(self: Attempt, event: Any) -> None:
        started(self, event)
        if not spoiled:
            spoiled.append(True)
            with torch.no_grad():
                loads.newest.get_parameter("model.embed_tokens.weight")[7, 3] += 1e-3

    monkeypatch.setattr(Attempt, "started", spoil)


def spoil_cleanup(loads: Loads, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first run cannot take its layers out of the model again."""
    restore = SparseLinear.restore
    spoiled: list[bool] = []

    def spoil(self: SparseLinear) -> None:
        if not spoiled:
            spoiled.append(True)
            raise RuntimeError("no")
        restore(self)

    monkeypatch.setattr(SparseLinear, "restore", spoil)


@pytest.mark.parametrize(
    ("spoil", "code"), [(spoil_embedding, "training_failed"), (spoil_cleanup, "internal_error")]
)
def test_a_changed_model_is_no_other_jobs(
    spoil: Callable[[Loads, pytest.MonkeyPatch], None],
    code: str,
    plant: Plant,
    loads: Loads,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    tmp_path: Path,
) -> None:
    caplog.set_level(logging.CRITICAL)  # what it captures keeps the trace, and so the model
    spoil(loads, monkeypatch)
    first, second, third = (plant.submit(*METHODS[1], suffix=f"made-{i}") for i in range(3))
    assert plant.work() == 3
    error = plant.get(first).error
    assert error is not None
    assert error.code == code
    right = alone(plant, tmp_path / "data.jsonl", *METHODS[1])
    assert [plant.get(job).digest for job in (second, third)] == [right, right]
    assert loads.alive[:2] == [0, 0], "the changed one is gone before another is loaded"
    assert len(loads.models) == 3, "the first two, and that of the run alone"


def change(base: LoadedBase) -> None:
    with base.lent("cpu", "fp32") as lent:
        lent.model.lm_head.weight[0, 0] += 1.0
        lent.check()


def test_a_model_is_given_up_however_a_run_fails(
    plant: Plant, loads: Loads, tmp_path: Path
) -> None:
    base = LoadedBase(plant.base)
    data = write_jsonl(tmp_path / "data.jsonl", counting_examples())
    config = TrainConfig.of(data=data, parameters={"density": 0.05}, **SETTINGS)
    right = digest(train(config, plant.base, loaded=base).delta_set)
    assert len(loads.models) == 1
    with pytest.raises(StoppedError):
        train(config, plant.base, loaded=base, stop=lambda: True)
    assert digest(train(config, plant.base, loaded=base).delta_set) == right
    assert len(loads.models) == 2
    with pytest.raises(BaseChangedError):
        change(base)
    assert digest(train(config, plant.base, loaded=base).delta_set) == right
    assert len(loads.models) == 3
    assert base.tokenizer is base.tokenizer


def test_another_precision_takes_another_model_only_if_the_files_are_of_16_bits(
    tmp_path: Path, loads: Loads
) -> None:
    wide = tiny_base(save_tiny(tiny_model("llama"), tmp_path / "wide"))
    half = tiny_base(save_tiny(tiny_model("llama").bfloat16(), tmp_path / "half"))
    for files, loaded in ((wide, 1), (half, 3)):
        base, before = LoadedBase(files), len(loads.models)
        narrow = torch.float32 if files is wide else torch.bfloat16
        for precision in ("fp32", "fp32", "bf16", "bf16", "fp32"):
            with base.lent("cpu", precision) as lent:
                assert lent.model.dtype == (narrow if precision == "bf16" else torch.float32)
                assert lent.fingerprint == files.fingerprint
            del lent
        assert len(loads.models) - before == loaded
        del base
    assert not any(loads.alive), "never two in memory"


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is one")
def test_a_device_that_is_not_there(plant: Plant, loads: Loads) -> None:
    with pytest.raises(ConfigError, match="CUDA"), LoadedBase(plant.base).lent("cuda", "fp32"):
        pass
    assert not loads.models


def test_nothing_trained_stays_in_memory(plant: Plant, loads: Loads) -> None:
    counts: list[Counter[str]] = []
    with Store(plant.data, plant.info) as store:
        backlog = Backlog(store.registry)
        worker = Worker(store, plant.base, backlog, plant.data / "work", name="here")
        for number in range(5):
            method, parameters = METHODS[number % 2]
            plant.submit(method, parameters, suffix=f"made-{number}")
            assert worker.run(threading.Event(), once=True) == 1
            kinds = [type(one) for one in gc.get_objects()]
            counts.append(Counter(kind.__name__ for kind in kinds if issubclass(kind, TENSORS)))
    assert counts[0]["Parameter"] == len(list(loads.newest.parameters()))
    assert counts == [counts[0]] * 5
    assert counts[0].keys().isdisjoint({SparseLinear.__name__, DenseLinear.__name__})
