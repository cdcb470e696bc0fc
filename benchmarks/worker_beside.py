"""What a training worker costs the server beside it: `python -m benchmarks.worker_beside [--csv]`.

One server that answers a batch of greedy streams; for each number of threads a worker with a job of
its own that does not end. They take turns: all workers stopped (SIGSTOP), then one of them running,
then the next. So every figure has its neighbour, measured a moment before on the same machine.

Tokens/s are those of the streams' answers; their prompts are short, and cached after the first
turn. The worker's steps/s are counted over its turns. `foreign` is what others used of the machine.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import signal
import statistics
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from openai import AsyncOpenAI, OpenAI

from benchmarks.common import RESULTS, Meter, Provenance, markdown, write_csv
from benchmarks.demo import GOSSAMER

EXAMPLE = "The {} of them went over the hill, where number {} had been before, and so they said:"
#: No pass ends meanwhile, so that no version is kept; leases outlast the turns of the others.
EXAMPLES, LEASE_S = 20_000, 3600


@dataclass
class Turns:
    """What was measured with one worker running, or with none (0 threads)."""

    threads: int
    process: subprocess.Popen[bytes] | None = None
    job: str | None = None
    tokens: list[float] = field(default_factory=list)
    foreign: list[float] = field(default_factory=list)
    steps: int = 0
    seconds: float = 0.0

    def tell(self, wanted: signal.Signals) -> None:
        """Stop the worker, or let it go on."""
        if self.process is not None:
            self.process.send_signal(wanted)


@dataclass(frozen=True)
class Line:
    """One row of the results."""

    worker_threads: int
    rows: int
    tokens_per_second: float
    of_alone: float
    worker_steps_per_second: float
    server_mib: int
    worker_mib: int
    foreign: float


@contextmanager
def started(*arguments: str, **options: Any) -> Iterator[subprocess.Popen[bytes]]:
    """A gossamer process until the end of the block, even if it is stopped by then."""
    command = [*GOSSAMER, *arguments, "--json"]
    with subprocess.Popen(command, stderr=subprocess.DEVNULL, **options) as process:
        try:
            yield process
        finally:
            process.kill()


def steps_of(client: OpenAI, job: str | None) -> int:
    """How far the job has come."""
    if job is None:
        return 0
    events = client.fine_tuning.jobs.list_events(job, limit=10).data
    return max((event.data["step"] for event in events if isinstance(event.data, dict)), default=0)


def examples() -> bytes:
    """A training file."""
    rows = (
        {"prompt": EXAMPLE.format(i, i * 7), "completion": f" number {i % 9}"}
        for i in range(EXAMPLES)
    )
    return "\n".join(map(json.dumps, rows)).encode()


def begin_job(client: OpenAI, file: str, turns: Turns) -> None:
    """A job for the worker that was just started, which is stopped once it is at work."""
    made = client.fine_tuning.jobs.create(
        model="base", training_file=file, suffix=f"threads-{turns.threads}", seed=turns.threads,
        extra_body={"hyperparameters": {"batch_size": 8, "max_steps": 1_000_000}},
    )  # fmt: skip
    turns.job = made.id
    while steps_of(client, turns.job) < 2:
        if client.fine_tuning.jobs.retrieve(made.id).status == "failed":
            raise SystemExit("the job failed")
        time.sleep(0.5)
    turns.tell(signal.SIGSTOP)


async def answers(url: str, key: str, rows: int, tokens: int) -> float:
    """Tokens/s of a batch of streams that begin together."""
    async with AsyncOpenAI(base_url=f"{url}/v1", api_key=key, timeout=600) as client:
        began = time.perf_counter()
        done = await asyncio.gather(
            *(
                client.completions.create(
                    model="base", prompt=f"Story number {row}: once upon a time", temperature=0,
                    max_tokens=tokens, extra_body={"ignore_eos": True},
                )
                for row in range(rows)
            )
        )  # fmt: skip
        counted = sum(one.usage.completion_tokens for one in done if one.usage is not None)
        return counted / (time.perf_counter() - began)


def peak_mib(process: subprocess.Popen[bytes] | None) -> int:
    """The most memory that a process has held."""
    if process is None:
        return 0
    text = Path(f"/proc/{process.pid}/status").read_text()
    return int(text.partition("VmHWM:")[2].split()[0]) // 1024


def measure(options: argparse.Namespace, data: Path) -> list[Line]:
    """Server, workers, turns."""
    where = ["--data-dir", str(data), "--base", options.base]
    with ExitStack() as stack:
        chosen = options.server_threads
        limits = [] if chosen is None else ["--threads", str(chosen)]
        up = started("up", *where, "--port", "0", *limits, stdout=subprocess.PIPE)
        server = stack.enter_context(up)
        assert server.stdout is not None
        told = json.loads(server.stdout.readline())
        client = stack.enter_context(OpenAI(base_url=f"{told['url']}/v1", api_key=told["key"]))
        file = client.files.create(file=("a.jsonl", examples()), purpose="fine-tune").id
        contenders = [Turns(0), *(Turns(count) for count in options.threads)]
        for turns in contenders[1:]:
            limits = ["--threads", str(turns.threads), "--lease", str(LEASE_S)]
            worker = started("worker", *where, *limits, stdout=subprocess.DEVNULL)
            turns.process = stack.enter_context(worker)
            begin_job(client, file, turns)
        for number in range(options.rounds + 1):
            for turns in contenders:
                before = steps_of(client, turns.job)
                turns.tell(signal.SIGCONT)
                with Meter() as meter:
                    speed = asyncio.run(
                        answers(told["url"], told["key"], options.rows, options.tokens)
                    )
                turns.tell(signal.SIGSTOP)
                if number:  # the first turn warms up
                    turns.tokens.append(speed)
                    turns.foreign.append(meter.foreign)
                    turns.steps += steps_of(client, turns.job) - before
                    turns.seconds += meter.seconds
        alone = statistics.median(contenders[0].tokens)
        return [
            Line(
                worker_threads=turns.threads,
                rows=options.rows,
                tokens_per_second=statistics.median(turns.tokens),
                of_alone=statistics.median(turns.tokens) / alone,
                worker_steps_per_second=turns.steps / turns.seconds,
                server_mib=peak_mib(server),
                worker_mib=peak_mib(turns.process),
                foreign=max(turns.foreign),
            )
            for turns in contenders
        ]


def main() -> None:
    """Measure, print, and write if asked to."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--base", default="smollm2-135m")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, os.cpu_count() or 2])
    parser.add_argument("--server-threads", type=int, help="torch's choice when not given")
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--csv", action="store_true", help="into benchmarks/results")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="gossamer-beside-") as folder:
        lines = measure(options, Path(folder) / "data")
    table = [
        [
            f"beside {line.worker_threads} threads" if line.worker_threads else "alone",
            f"{line.tokens_per_second:.1f}", f"{line.of_alone:.2f}",
            f"{line.worker_steps_per_second:.2f}", str(line.server_mib), str(line.worker_mib),
            f"{line.foreign:.2f}",
        ]
        for line in lines
    ]  # fmt: skip
    head = ["", "tokens/s", "of alone", "worker steps/s", "server MiB", "worker MiB", "foreign"]
    print(markdown(head, table))
    if options.csv:
        here = Provenance.here().columns()
        write_csv(RESULTS / "worker_beside.csv", [{**asdict(line), **here} for line in lines])


if __name__ == "__main__":
    main()
