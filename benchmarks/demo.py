"""Train two sparse adapters, serve them beside the base, and ask four models in one batch.

Everything goes through the front door: `gossamer up --with-worker`, `gossamer train` and
`gossamer adapters push` for the first adapter, and the openai client, which has the second one
trained as a job. The data directory is new; it is removed at the end unless --keep is given.
Exits with 0 only if every answer came and the digests agree.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from openai import AsyncOpenAI, OpenAI
from openai.types.fine_tuning import FineTuningJob
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from benchmarks.tasks import TASKS, Task, write_training_file
from gossamer.base.fetch import sha256_of
from gossamer.store.format import digest, read

GOSSAMER = [str(Path(sys.executable).with_name("gossamer"))]
MIX = "sections*0.5+reversal*0.5"
MODELS = ("base", "sections", "reversal", MIX)
ROUNDS = 3
#: seconds that a job may take: it waits for nobody, and takes about two minutes on two cores
JOB_SECONDS = 600.0
console = Console()


@dataclass(frozen=True)
class Server:
    """A running server and the key that it showed once."""

    url: str
    key: str

    def environment(self) -> dict[str, str]:
        """For the other commands."""
        return os.environ | {"GOSSAMER_URL": self.url, "GOSSAMER_API_KEY": self.key}


def command(server: Server | None, *arguments: str) -> Any:
    """Run a gossamer command with --json and return what it printed last."""
    env = server.environment() if server else None
    run = [*GOSSAMER, *arguments, "--json"]
    done = subprocess.run(run, env=env, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"gossamer {' '.join(arguments)} failed with {done.returncode}")
    return json.loads(done.stdout.strip().splitlines()[-1])


@contextmanager
def serving(data: Path) -> Iterator[Server]:
    """`gossamer up` on a free port, with a worker that may use every processor: nobody asks the
    server while it trains."""
    threads = str(len(os.sched_getaffinity(0)))
    up = [*GOSSAMER, "up", "--data-dir", str(data), "--port", "0", "--json"]
    up += ["--with-worker", "--worker-threads", threads]
    with (
        (data.parent / "server.log").open("w") as log,
        subprocess.Popen(up, stdout=subprocess.PIPE, stderr=log, text=True) as process,
    ):
        assert process.stdout is not None
        line = process.stdout.readline()
        if not line:
            raise SystemExit((data.parent / "server.log").read_text()[-2000:])
        told = json.loads(line)
        try:
            yield Server(told["url"], told["key"])
        finally:
            process.terminate()
            process.wait(60)


def _flag(name: str, value: Any) -> tuple[str, str]:
    """A setting as the command line spells it."""
    return "--set", f"{name}={value}"


def _settings(task: Task, max_steps: int | None) -> dict[str, Any]:
    return dict(task.settings) | ({} if max_steps is None else {"max_steps": max_steps})


def train_here(server: Server, task: Task, data: Path, max_steps: int | None) -> dict[str, Any]:
    """Train one adapter with `gossamer train`, push it, and check that what is served is what was
    trained."""
    folder = data.parent
    examples = write_training_file(task, folder / f"{task.name}.jsonl")
    file = folder / f"{task.name}.gossamer"
    settings = _settings(task, max_steps)
    chosen = {**settings.pop("parameters"), **settings}
    flags = [part for name in chosen if name != "method" for part in _flag(name, chosen[name])]
    begin = time.perf_counter()
    trained = command(
        None,
        "train",
        "--method",
        settings["method"],
        "--data",
        str(examples),
        "--data-dir",
        str(data),
        "--out",
        str(file),
        *flags,
    )
    seconds = time.perf_counter() - begin
    pushed = command(server, "adapters", "push", task.name, str(file))
    back = folder / f"{task.name}.back"
    command(server, "adapters", "pull", task.name, "--out", str(back))
    agree = trained["digest"] == pushed["digest"] and back.read_bytes() == file.read_bytes()
    return {
        "method": settings["method"],
        "nnz": trained["nnz"],
        "seconds": seconds,
        "bytes": file.stat().st_size,
        "digests": agree,
    }


def _followed(client: OpenAI, job: FineTuningJob) -> FineTuningJob:
    """The job as it is when it is over; until then its last event stands on the screen."""
    begin = time.perf_counter()
    with console.status("") as line:
        while job.status in ("validating_files", "queued", "running"):
            if time.perf_counter() - begin > JOB_SECONDS:
                raise SystemExit(f"the job is {job.status} after {JOB_SECONDS:.0f} s")
            time.sleep(0.5)
            job = client.fine_tuning.jobs.retrieve(job.id)
            for event in client.fine_tuning.jobs.list_events(job.id, limit=1).data:
                line.update(escape(event.message))
    return job


def train_by_job(server: Server, task: Task, data: Path, max_steps: int | None) -> dict[str, Any]:
    """Have one adapter trained by the server's worker, and ask it as soon as the job is over."""
    examples = write_training_file(task, data.parent / f"{task.name}.jsonl")
    settings = _settings(task, max_steps)
    adapter = {"method": settings.pop("method"), **settings.pop("parameters")}
    if max_steps is not None:
        adapter |= {"calibration_steps": max_steps}
    with OpenAI(base_url=f"{server.url}/v1", api_key=server.key) as client:
        begin = time.perf_counter()
        file = client.files.create(file=examples, purpose="fine-tune")
        job = client.fine_tuning.jobs.create(
            model="base",
            training_file=file.id,
            suffix=task.name,
            seed=0,
            extra_body={"adapter": adapter, "hyperparameters": settings},
        )
        job = _followed(client, job)
        seconds = time.perf_counter() - begin
        if job.status != "succeeded" or job.fine_tuned_model is None:
            raise SystemExit(f"the job is {job.status}: {job.error}")
        first = client.completions.create(
            model=job.fine_tuned_model, prompt=task.held_out[0].prompt, max_tokens=1
        )
        answered = time.perf_counter() - begin - seconds
    console.print(f"{task.name} answers {answered:.2f} s after its job was seen to succeed")
    pulled = data.parent / f"{task.name}.gossamer"
    came = command(server, "adapters", "pull", task.name, "--out", str(pulled))
    versions = command(server, "adapters", "show", task.name)["versions"]
    (version,) = (one for one in versions if one["current"])
    # What the job says, what the catalog says, and what the bytes say that came over the wire.
    said = {getattr(job, "digest", None), came["digest"], version["digest"]}
    agree = came["sha256"] == sha256_of(pulled) and said == {digest(read(pulled))}
    return {
        "method": adapter["method"],
        "nnz": version["nnz"],
        "seconds": seconds,
        "bytes": pulled.stat().st_size,
        "digests": agree and bool(first.choices),
    }


async def answer(client: AsyncOpenAI, model: str, task: Task, prompt: str, **extra: Any) -> str:
    """One greedy completion."""
    done = await client.completions.create(
        model=model,
        prompt=prompt,
        max_tokens=task.max_tokens,
        temperature=0,
        stop=task.stop,
        extra_body=extra or None,
    )
    return done.choices[0].text


async def held_out(
    client: AsyncOpenAI, task: Task, model: str, *, constrained: bool = False
) -> float:
    """Accuracy on the held-out items, sixteen requests at a time."""
    gate = asyncio.Semaphore(16)

    async def one(index: int) -> str:
        item = task.held_out[index]
        extra: dict[str, Any] = (
            {"structured_outputs": {"choice": list(item.choices)}} if constrained else {}
        )
        async with gate:
            return await answer(client, model, task, item.prompt, **extra)

    return task.accuracy(await asyncio.gather(*map(one, range(len(task.held_out)))))


async def side_by_side(client: AsyncOpenAI, tasks: list[Task]) -> bool:
    """One concurrent batch: every model answers one question of each task."""
    asked = [(model, task) for task in tasks for model in MODELS]
    begin = time.perf_counter()
    texts = await asyncio.gather(
        *(answer(client, model, task, task.held_out[0].prompt) for model, task in asked)
    )
    seconds = time.perf_counter() - begin
    table = Table("model", *(task.title for task in tasks), title="One batch, four models")
    for row, model in enumerate(MODELS):
        table.add_row(model, *(texts[i * len(MODELS) + row].strip() for i in range(len(tasks))))
    table.add_row("right", *(task.held_out[0].completion.strip() for task in tasks), style="dim")
    console.print(table)
    console.print(f"{len(asked)} requests in {seconds:.2f} s")
    return len(texts) == len(asked)


async def scores(client: AsyncOpenAI, tasks: list[Task]) -> None:
    """Held-out accuracy of base, adapters and mix."""
    columns = ("base, choice", "base, free", "adapter", "0.5/0.5 mix")
    table = Table("task", "held out", *columns, title="Held-out accuracy")
    for task in tasks:
        choice = await held_out(client, task, "base", constrained=True)
        free = await held_out(client, task, "base")
        adapter = await held_out(client, task, task.name)
        mixed = await held_out(client, task, MIX)
        table.add_row(
            task.name,
            str(len(task.held_out)),
            *(f"{s:.2f}" for s in (choice, free, adapter, mixed)),
        )
        clear = adapter > max(choice, free) + 0.1
        verdict = "a clear gain" if clear else "[bold]no clear gain[/bold]"
        console.print(f"{task.name}: {max(choice, free):.2f} → {adapter:.2f}, {verdict}")
    console.print(table)


async def throughput(client: AsyncOpenAI) -> None:
    """Sixteen streams of 48 tokens: each row another model, against the base alone."""

    async def batch(models: tuple[str, ...]) -> float:
        begin = time.perf_counter()
        done = await asyncio.gather(
            *(
                client.completions.create(
                    model=models[i % len(models)],
                    prompt=f"Story number {i}: once upon a time",
                    max_tokens=48,
                    temperature=0,
                    extra_body={"ignore_eos": True},
                )
                for i in range(16)
            )
        )
        tokens = sum(d.usage.completion_tokens for d in done if d.usage)
        return tokens / (time.perf_counter() - begin)

    await batch(MODELS)  # warm
    rates = [(await batch(("base",)), await batch(MODELS)) for _ in range(ROUNDS)]
    base = statistics.median(rate for rate, _ in rates)
    mixed = statistics.median(rate for _, rate in rates)
    ratio = statistics.median(m / b for b, m in rates)
    console.print(
        f"Throughput of 16 streams, medians of {ROUNDS}: base only {base:.0f} tokens/s, "
        f"four models in one batch {mixed:.0f} tokens/s, ratio {ratio:.2f}"
    )


async def ask(server: Server, tasks: list[Task]) -> bool:
    """Everything that goes through the openai client."""
    async with AsyncOpenAI(base_url=f"{server.url}/v1", api_key=server.key) as client:
        came = await side_by_side(client, tasks)
        await scores(client, tasks)
        await throughput(client)
    return came


def report(trained: list[dict[str, Any]], tasks: list[Task], data: Path) -> None:
    """What the adapters took."""
    (weights,) = (data / "bases").glob("*/model.safetensors")
    base = weights.stat().st_size
    for task, result in zip(tasks, trained, strict=True):
        console.print(
            f"{task.name}: {result['method']} in {result['seconds']:.0f} s, "
            f"{result['nnz']:,} entries in "
            f"{result['bytes']:,} bytes, 1/{base // result['bytes']} of the base (fp32); "
            f"digest {'agrees' if result['digests'] else 'DIFFERS'}"
        )


def main() -> int:
    """Run the demo."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--max-steps", type=int, help="train less, to try the demo itself")
    parser.add_argument("--held-out", type=int, default=40, help="items a score is taken over")
    parser.add_argument("--keep", type=Path, help="keep the data directory here")
    parser.add_argument("--cache", type=Path, default=Path.home() / ".cache" / "gossamer" / "demo")
    options = parser.parse_args()
    begin = time.perf_counter()
    folder = Path(tempfile.mkdtemp(prefix="gossamer-demo-"))
    data = options.keep or folder / "data"
    data.mkdir(parents=True, exist_ok=True)
    tasks = [make(options.cache, 0, options.held_out) for make in TASKS.values()]
    try:
        console.print("Starting the server (the base model is fetched and converted once) …")
        with serving(data) as server:
            console.print(f"Listening on {server.url} after {time.perf_counter() - begin:.0f} s")
            trained = []
            for task, train in zip(tasks, (train_here, train_by_job), strict=True):
                console.print(f"Training {task.name}: {task.title} …")
                trained.append(train(server, task, data, options.max_steps))
            report(trained, tasks, data)
            came = asyncio.run(ask(server, tasks))
    finally:
        shutil.rmtree(folder)
    good = came and all(result["digests"] for result in trained)
    console.print(f"{'Done' if good else 'FAILED'} after {time.perf_counter() - begin:.0f} s")
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
