"""Jobs of every method, from OpenAI's client through a worker to the first answer: what the server
answers with is what the trainer had at the end."""

from __future__ import annotations

import io
import logging
import subprocess
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from gossamer.base.load import BaseFiles, load_model, load_tokenizer
from gossamer.jobs.backlog import Backlog
from gossamer.store.catalog.opening import Store
from gossamer.store.delta import DeltaSet
from gossamer.store.format import digest, read
from gossamer.training import TrainConfig
from gossamer.training.references import CatalogAdapters
from gossamer.training.run import train
from gossamer.training.worker import Worker
from tests.api.hand import base_of
from tests.api.running import Running, running
from tests.api.test_increments import joined
from tests.api.trained import (
    TOLERANCE,
    Final,
    difference,
    model_logprobs,
    server_logprobs,
    trained_layers,
)
from tests.api.tuning import Tenant
from tests.cli.running import GOSSAMER, environment
from tests.training.support import counting_examples, write_jsonl
from tests.worker.support import still_heap

log = logging.getLogger(__name__)

#: From "the job has succeeded" to the first answer, in seconds.
SOON = 5.0
SETTINGS = {
    "batch_size": 8, "max_steps": 4, "learning_rate": 1e-2, "eval_fraction": 0.25,
}  # fmt: skip
METHODS: dict[str, dict[str, Any]] = {
    "sparta": {"density": 0.05},
    "lota": {"sparsity": 0.9, "calibration_steps": 2},
    "lotto": {"sparsity": 0.9, "calibration_steps": 2},
    "mcs": {"keep_ratio": 0.1, "period": 1, "warmup_steps": 1, "block_size": 8},
}
DTYPES = ("F32", "BF16")
CASES = [(method, dtype) for method in METHODS for dtype in DTYPES]
HELD_OUT = tuple(f"Count {i}: three one two, said {i % 7} of them." for i in range(90, 96))


def name_of(method: str, dtype: str) -> str:
    return f"{method}-{dtype.lower()}"


def order(method: str, dtype: str) -> dict[str, Any]:
    """The method's parameters; a chain begins with LoTA's adapter."""
    chain = {"parents": [name_of("lota", dtype)]} if method == "lotto" else {}
    return {**METHODS[method], **chain}


@dataclass(frozen=True)
class Made:
    """Jobs of every method that have ended, by the names of their adapters."""

    server: Running
    tenant: Tenant
    base: BaseFiles
    data: Path
    jobs: dict[str, Any]

    @property
    def prompts(self) -> list[tuple[int, ...]]:
        tokenizer = load_tokenizer(self.base)
        return [tuple(tokenizer(text).input_ids) for text in HELD_OUT]


@pytest.fixture(scope="module")
def made(api_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Made]:
    with still_heap(), running(api_base, tmp_path_factory.mktemp("trained")) as server:
        tenant = Tenant(server, "trainers")
        data = write_jsonl(tmp_path_factory.mktemp("data") / "a.jsonl", counting_examples())
        with data.open("rb") as file:
            tenant.file = tenant.client.files.create(file=file, purpose="fine-tune").id
        jobs: dict[str, Any] = {}
        for method, dtype in CASES:
            jobs[name_of(method, dtype)] = tenant.create(
                {"method": method, **order(method, dtype)},
                suffix=name_of(method, dtype), seed=5,
                hyperparameters={**SETTINGS, "value_dtype": dtype},
            )  # fmt: skip
            if method == "lota":  # what a chain begins with must be there when it is asked for
                assert work(server) > 0
        work(server)
        jobs = {name: tenant.jobs.retrieve(job.id) for name, job in jobs.items()}
        yield Made(server, tenant, server.services.base, data, jobs)


def work(server: Running) -> int:
    """A worker on the server's data folder, until the queue is empty."""
    data_dir = server.services.settings.data_dir
    with Store(data_dir, base_of(server)) as store:
        backlog = Backlog(store.registry)
        worker = Worker(store, server.services.base, backlog, data_dir / "work", name="beside")
        return worker.run(threading.Event(), once=True)


def trainers(made: Made, method: str, dtype: str) -> tuple[DeltaSet, list[Tensor]]:
    """The same run as the job's, and what its model said at its end."""
    model = load_model(made.base, attention="sdpa")
    final = Final(model, made.prompts)
    config = TrainConfig.of(
        data=made.data, method=method, parameters=order(method, dtype), seed=5,
        value_dtype=dtype, **SETTINGS,
    )  # fmt: skip
    adapters = CatalogAdapters(made.server.services.catalog, made.tenant.name)
    result = train(config, made.base, model=model, watcher=final, adapters=adapters)
    return result.delta_set, final.logprobs


@pytest.mark.parametrize(("method", "dtype"), CASES)
def test_the_server_answers_as_the_trainers_model_would(
    method: str, dtype: str, made: Made
) -> None:
    """Log-probabilities of the whole vocabulary at every place of held-out prompts, in fp32."""
    job = made.jobs[name_of(method, dtype)]
    assert (job.status, job.error) == ("succeeded", None)
    delta_set, at_the_end = trainers(made, method, dtype)
    assert job.digest == digest(delta_set), "the run is the job's"
    served = server_logprobs(made.server, job.digest, made.prompts)
    model = load_model(made.base, attention="sdpa")
    plain = model_logprobs(model, made.prompts)
    with trained_layers(model, delta_set):
        exported = model_logprobs(model, made.prompts)
    assert difference(served, exported) < TOLERANCE
    if dtype == "F32":
        assert difference(served, at_the_end) < TOLERANCE
        assert difference(exported, at_the_end) == 0.0
    else:  # what the trainer had before the values were rounded is another model
        assert 0.0 < difference(exported, at_the_end) < 0.1 * difference(plain, at_the_end)
    # The comparison can tell models apart.
    assert difference(plain, at_the_end) > 100 * TOLERANCE
    assert difference(server_logprobs(made.server, None, made.prompts), plain) < TOLERANCE


def test_a_slightly_changed_adapter_is_told_from_the_right_one(made: Made) -> None:
    """A thousandth of one adapter's values: the tolerance is no formality."""
    job = made.jobs["sparta-f32"]
    right = server_logprobs(made.server, job.digest, made.prompts)
    content = made.server.services.catalog.open(job.digest)
    deltas = {
        name: type(delta).element(
            delta.shape, delta.positions, delta.values * 1.001, value_dtype="F32"
        )
        for name, delta in content.deltas.items()
    }
    model = load_model(made.base, attention="sdpa")
    with trained_layers(model, DeltaSet(content.base_fingerprint, "", deltas)):
        wrong = model_logprobs(model, made.prompts)
    assert difference(right, wrong) > TOLERANCE


@pytest.mark.parametrize("method", METHODS)
def test_openais_client_follows_a_job_and_asks_what_it_made(method: str, made: Made) -> None:
    job, client = made.jobs[name_of(method, "BF16")], made.tenant.client
    assert job.fine_tuned_model == name_of(method, "BF16")
    assert made.tenant.text(job.fine_tuned_model) != made.tenant.text("base")
    messages = [event.message for event in client.fine_tuning.jobs.list_events(job.id, limit=100)]
    assert messages[0] == f"The job succeeded: {job.version}."
    assert any(message.startswith("Step 1/") for message in messages)
    assert any(message.startswith(f"{method} trains") for message in messages)
    (file,) = job.result_files
    table = client.files.content(file).read().decode().splitlines()
    assert table[0].startswith("step,train_loss,valid_loss")
    assert len(table) > SETTINGS["max_steps"]


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_link_and_its_parents_come_apart_and_together(dtype: str, made: Made) -> None:
    link, parent = made.jobs[name_of("lotto", dtype)], made.jobs[name_of("lota", dtype)]
    with made.server.http(made.tenant.key) as http:
        reply = http.get(f"/v1/adapters/{link.fine_tuned_model}/content?increment=true")
    assert reply.status_code == 200, reply.text
    alone = read(io.BytesIO(reply.content))
    open_ = made.server.services.catalog.open
    assert [one["digest"] for one in alone.record["increment"]["parents"]] == [parent.digest]
    assert digest(joined([open_(parent.digest), alone], open_(link.digest))) == link.digest


#: A few steps that are short enough on two cores, the values in either form.
REAL: dict[str, tuple[str, dict[str, Any]]] = {
    "sparta": ("BF16", {"density": 0.005}),
    "lota": ("F32", {"sparsity": 0.99, "calibration_steps": 1}),
    "lotto": ("F32", {"sparsity": 0.99, "calibration_steps": 1, "parents": ["lota"]}),
    "mcs": ("BF16", {"keep_ratio": 0.05, "period": 1, "warmup_steps": 1, "targets": "q,v"}),
}
PAIRS = (("sun", "moon"), ("red", "blue"), ("tree", "leaf"), ("cat", "dog"))
ROWS = [{"prompt": f"Words: {a}, {b}\nReversed:", "completion": f" {b}, {a}"} for a, b in PAIRS]
TEXTS = ("Words: bread, water\nReversed: water, bread", "The capital of France is Paris, and")


def finished(tenant: Tenant, job_id: str) -> Any:
    """Wait as a client does, and look often."""
    while (job := tenant.jobs.retrieve(job_id)).status in ("queued", "running"):
        time.sleep(0.02)
    return job


@pytest.mark.gate
@pytest.mark.smollm2
@pytest.mark.timeout(900)
def test_smollm2_answers_soon_and_as_it_was_trained(smollm2: BaseFiles, tmp_path: Path) -> None:
    """A worker of its own process; the first answer is asked for as soon as a client can know."""
    where = {"base": smollm2.path, "data-dir": tmp_path / "data", "threads": 1}
    options = [text for name, value in where.items() for text in (f"--{name}", str(value))]
    with running(smollm2.path, tmp_path / "data", memory_bytes=256 << 20) as server:
        tenant = Tenant(server, "trainers")
        data = write_jsonl(tmp_path / "a.jsonl", ROWS)
        with data.open("rb") as file:
            tenant.file = tenant.client.files.create(file=file, purpose="fine-tune").id
        command = [str(GOSSAMER), "worker", *options]
        out = (tmp_path / "worker.log").open("w")
        with out, subprocess.Popen(command, env=environment(), stdout=out, stderr=out) as worker:
            try:
                for method, (dtype, parameters) in REAL.items():
                    job = tenant.create(
                        {"method": method, **parameters}, suffix=method, seed=5,
                        hyperparameters={"max_steps": 3, "batch_size": 4, "value_dtype": dtype},
                    )  # fmt: skip
                    job = finished(tenant, job.id)
                    assert job.status == "succeeded", job.error
                    tenant.text(method)
                    answered = datetime.now(UTC)
                    ended = server.services.backlog.get(tenant.name, job.id).finished_at
                    assert ended is not None
                    took = (answered - ended).total_seconds()
                    log.info("%s: %.2f s from the job's end to the first answer", method, took)
                    assert 0.0 < took < SOON, method
                    assert_agreement(server, job.digest, smollm2)
            finally:
                worker.terminate()
        assert worker.returncode == 0


def assert_agreement(server: Running, made: str, base: BaseFiles) -> None:
    """Between the server and the trainer's model with the values that the adapter stores.

    The two add up in different orders. On logits of up to 32 that alone makes a few of a million
    values of the base differ by 1.1e-4 (by 0.9e-4 and 0.35e-4 from the same sums in float64); the
    adapter may add as little to it as is asked for of the whole. How many are beyond depends on
    the adapter and on what the engine computes together: of a dozen adapters, each asked in four
    ways, up to 7 in 100,000; 24 of one that is not among these, MCS's with the sign +.
    """
    tokenizer = load_tokenizer(base)
    prompts = [tuple(tokenizer(text).input_ids) for text in TEXTS]
    delta_set = server.services.catalog.open(made)
    served = server_logprobs(server, made, prompts)
    model = load_model(base, attention="sdpa")
    plain = model_logprobs(model, prompts)
    with trained_layers(model, delta_set):
        trained = model_logprobs(model, prompts)
    of_the_base = difference(server_logprobs(server, None, prompts), plain)
    apart = torch.cat([(a - b).abs().flatten() for a, b in zip(served, trained, strict=True)])
    near = float((apart < TOLERANCE).double().mean())
    log.info("at most %.2g apart, the base %.2g; %.6f near", apart.max(), of_the_base, near)
    assert near > 0.9999
    assert float(apart.max()) < of_the_base + TOLERANCE < 3 * TOLERANCE
    assert difference(served, plain) > 10 * TOLERANCE
