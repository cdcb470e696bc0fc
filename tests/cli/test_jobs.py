"""`gossamer jobs` against a real server; a worker's side of the queue is driven from here."""

from __future__ import annotations

import json
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any, ClassVar

import openai
import pytest

from gossamer.jobs.backlog import Backlog
from gossamer.jobs.views import Claim, JobError, Progress
from gossamer.store.catalog.opening import Store
from tests.api.running import make_file
from tests.cli.running import GOSSAMER, Live, assert_three_lines, environment, run, run_json
from tests.cli.terminal import Terminal
from tests.training.support import counting_examples, write_jsonl


class Hand:
    """A worker's side of the live server's queue, move by move."""

    def __init__(self, live: Live, store: Store) -> None:
        self._live = live
        self._store = store
        self.backlog = Backlog(store.registry)
        self.claim: Claim | None = None

    def take(self, job_id: str) -> None:
        """Claim the job, which must be the one whose turn it is."""
        self.claim = self.backlog.claim("hand", 60.0)
        assert self.claim is not None
        assert self.claim.job.id == job_id

    @property
    def held(self) -> Claim:
        assert self.claim is not None
        return self.claim

    def step(self, step: int, steps: int = 4) -> None:
        """Report a step, as the worker does."""
        progress = Progress(step, steps, 2.0 / step, 10 * step, remaining_s=60.0)
        self.backlog.heartbeat(self.held, 60.0, progress)
        data = {
            "step": step,
            "total_steps": steps,
            "phase": "train",
            "train_loss": 2.0 / step,
            "learning_rate": 1e-3,
            "tokens_per_second": 123.4,
        }
        message = f"Step {step}/{steps}: training loss={2.0 / step:.4f}"
        self.backlog.event(self.held, "info", message, data)

    def evaluated(self, step: int) -> None:
        data = {
            "step": step, "valid_loss": 1.5, "valid_mean_token_accuracy": 0.25,
            "valid_exact_match": 0.125,
        }  # fmt: skip
        message = f"Step {step}: validation loss=1.5000"
        self.backlog.event(self.held, "info", message, data, key=f"evaluated-{step}")

    def checkpoint(self, step: int) -> None:
        also = self.backlog.checkpointing(self.held, step, {"step": step, "train_loss": 0.5})
        self._upload(seed=step, tag=f"step-{step}", activate=False, also=also)

    def finish(self, seed: int) -> None:
        self._upload(seed=seed, also=self.backlog.finishing(self.held, trained_tokens=40))

    def _upload(self, *, seed: int, **options: Any) -> None:
        job = self.held.job
        content = make_file(self._live.info(), seed)
        self._store.catalog.upload(job.tenant, job.adapter, [content], **options)

    def fail(self, error: JobError) -> None:
        self.backlog.fail(self.held, error)


@pytest.fixture
def hand(live: Live) -> Iterator[Hand]:
    with Store(live.data_dir, live.info()) as store:
        made = Hand(live, store)
        yield made
        for job in made.backlog.list("default", limit=1000).items:  # nothing for the next test
            is_finished = job.status in ("succeeded", "failed", "cancelled")
            if not is_finished and made.backlog.cancel("default", job.id).status == "running":
                made.backlog.cancelled(made.held)


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return write_jsonl(tmp_path / "examples.jsonl", counting_examples())


@pytest.fixture
def client(live: Live) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{live.url}/v1", api_key=live.key, max_retries=0) as made:
        yield made


def create(live: Live, data: Path, *options: str | Path) -> dict[str, Any]:
    job: dict[str, Any] = run_json("jobs", "create", "--data", data, *options, env=live.env)
    return job


def test_a_job_is_created_with_everything_that_was_said(
    live: Live, hand: Hand, data: Path, client: openai.OpenAI, tmp_path: Path
) -> None:
    run_json("adapters", "push", "first", live.adapter(tmp_path, 31), env=live.env)
    held_out = write_jsonl(tmp_path / "held.jsonl", counting_examples(3))
    sets = ("parents=first", "sparsity=0.95", "block_size=8", "n_epochs=2", "packing=true")
    options = [word for text in sets for word in ("--set", text)]
    job = create(
        live, data, "--method", "lotto", *options, "--name", "second", "--seed", "7",
        "--eval-data", held_out,
    )  # fmt: skip
    assert job["status"] == "queued"
    assert (job["suffix"], job["seed"]) == ("second", 7)
    assert job["adapter"]["method"] == "lotto"
    assert job["adapter"]["parents"] == ["first"]
    assert (job["adapter"]["sparsity"], job["adapter"]["block_size"]) == (0.95, 8)
    assert job["hyperparameters"]["n_epochs"] == 2
    assert job["hyperparameters"]["packing"] is True
    assert list(job["references"]) == ["first"]
    for field, file in (("training_file", data), ("validation_file", held_out)):
        assert client.files.content(job[field]).read() == file.read_bytes()
        assert client.files.retrieve(job[field]).filename == file.name

    again = create(live, Path(job["training_file"]), "--name", "third")
    assert again["training_file"] == job["training_file"], "the id of a file that is there"

    shown = run("jobs", "show", job["id"], env=live.env).stdout
    for part in (job["id"], "queued", "second", "lotto", "sparsity=0.95", "packing=true", "first@"):
        assert part in shown
    assert 'parents=["first"]' in shown


@pytest.mark.parametrize("name", ["sparta", "lota", "mcs"])
def test_every_setting_can_be_sent_as_it_is_listed(
    live: Live, hand: Hand, data: Path, name: str
) -> None:
    """The server reads JSON strictly: texts must have become numbers on the way."""
    document = run_json("methods", name)
    options = []
    for field in (*document["parameters"], *document["settings"]):
        default = json.loads(field["default"])
        text = default if isinstance(default, str) else field["default"]
        options += ["--set", f"{field['name']}={text}"]
    job = create(live, data, "--method", name, *options)
    assert job["adapter"]["method"] == name


def test_jobs_are_listed_and_steered(live: Live, hand: Hand, data: Path) -> None:
    jobs = [create(live, data, "--name", f"listed-{i}") for i in range(3)]
    listed = run_json("jobs", "ls", "--limit", "2", env=live.env)
    assert [job["id"] for job in listed["data"]] == [jobs[2]["id"], jobs[1]["id"]]
    assert listed["has_more"] is True
    head, first, *_ = run("jobs", "ls", env=live.env).stdout.splitlines()
    assert head.split() == ["ID", "STATUS", "METHOD", "ADAPTER", "STEP", "CREATED"]
    assert first.split()[:5] == [jobs[2]["id"], "queued", "sparta", "listed-2", "-"]
    unnamed = create(live, data)
    made_up = unnamed["adapter_name"]
    assert made_up.startswith("ft-")
    assert run("jobs", "ls", env=live.env).stdout.splitlines()[1].split()[3] == made_up
    assert f"adapter         {made_up}\n" in run("jobs", "show", unnamed["id"], env=live.env).stdout

    def steered(action: str, job: dict[str, Any]) -> str:
        result = run("jobs", action, job["id"], env=live.env)
        assert result.exit_code == 0, result.stderr
        return result.stdout.strip()

    assert steered("pause", jobs[0]).endswith("is paused.")
    assert steered("resume", jobs[0]).endswith("is queued.")
    assert steered("cancel", jobs[1]).endswith("is cancelled.")
    hand.take(jobs[0]["id"])
    hand.step(1)
    assert steered("pause", jobs[0]).endswith("is running, asked to pause.")
    assert "1/4" in run("jobs", "ls", env=live.env).stdout
    hand.backlog.paused(hand.held)
    refused = run("jobs", "resume", jobs[1]["id"], env=live.env)
    assert_three_lines(refused, "409", "cancelled", "gossamer jobs show")


def test_a_page_is_not_the_end(live: Live, hand: Hand, data: Path) -> None:
    job = create(live, data, "--name", "paged")
    hand.take(job["id"])
    for step in range(1, 131):
        hand.step(step, 130)
        if step % 10 == 0:
            hand.checkpoint(step)
    logged = run("jobs", "logs", job["id"], "--json", env=live.env).stdout.splitlines()
    steps = [(json.loads(line)["data"] or {}).get("step") for line in logged]
    assert [step for step in steps if step is not None] == list(range(1, 131))
    shown = run_json("jobs", "show", job["id"], env=live.env)
    assert [c["step_number"] for c in shown["checkpoints"]] == list(range(130, 0, -10))
    assert "paged@step-130" in run("jobs", "show", job["id"], env=live.env).stdout
    many = run_json("jobs", "ls", "--limit", "10000", env=live.env)
    assert many["has_more"] is False


def in_background(work: Callable[[], None]) -> threading.Thread:
    """Runs while the command in this thread waits; a failure in it must show."""
    failed: list[BaseException] = []

    def guarded() -> None:
        try:
            work()
        except BaseException as error:  # noqa: BLE001
            failed.append(error)

    class Joined(threading.Thread):
        def join(self, timeout: float | None = None) -> None:
            super().join(timeout)
            if failed:
                raise failed[0]

    thread = Joined(target=guarded)
    thread.start()
    return thread


def test_a_job_is_waited_for(live: Live, hand: Hand, data: Path) -> None:
    def work() -> None:
        while (claim := hand.backlog.claim("hand", 60.0)) is None:
            time.sleep(0.05)
        hand.claim = claim
        for step in (1, 2):
            hand.step(step, 2)
        hand.evaluated(2)
        time.sleep(1.2)  # the command looks in between
        hand.finish(41)

    worker = in_background(work)
    options = ("--data", data, "--name", "waited", "--wait")
    result = run("jobs", "create", *options, "--json", env=live.env)
    worker.join()
    assert result.exit_code == 0, result.stderr
    assert result.stderr == ""
    lines = [json.loads(line) for line in result.stdout.splitlines()]
    kinds = [line["object"] for line in lines]
    assert kinds == ["fine_tuning.job", *["fine_tuning.job.event"] * 6, "fine_tuning.job"]
    assert [line["id"] for line in lines[1:-1]] == sorted(line["id"] for line in lines[1:-1])
    assert lines[-1]["status"] == "succeeded"
    assert lines[-1]["fine_tuned_model"] == "waited"
    assert run("chat", "--model", "waited", "-m", "Count", env=live.env).exit_code == 0

    followed = run("jobs", "logs", "-f", lines[0]["id"], env=live.env)
    assert followed.exit_code == 0
    told = followed.stdout.splitlines()
    assert "Step 1/2: training loss=2.0000" in told[2]
    assert told[-1].startswith(f"{lines[0]['id']} succeeded: `gossamer chat --model waited`")
    assert "\x1b" not in followed.output


class _Restarting(BaseHTTPRequestHandler):
    """A server that is away for a while, in both ways of being so."""

    requests = 0
    sent: ClassVar[list[str]] = []

    def do_GET(self) -> None:
        type(self).requests += 1
        if self.requests == 3:
            self.close_connection = True  # without a word
            return
        status, body = 200, self._body()
        if self.requests == 4:
            error = {"message": "It stops.", "type": "server_error", "code": None, "param": None}
            status, body = 503, {"error": error}
        content = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("content-length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def _body(self) -> dict[str, Any]:
        finished = self.requests > 4
        if "/events" not in self.path:
            status = "cancelled" if finished else "running"
            return {"id": "ftjob-1", "status": status, "fine_tuned_model": None}
        self.sent.append(self.path)
        event = {"id": f"e{finished:d}", "created_at": 1, "level": "info", "message": "m"}
        return {"data": [{**event, "data": None}], "has_more": False}

    def log_message(self, *_: object) -> None:
        pass


def test_a_server_that_starts_anew_is_waited_for() -> None:
    with HTTPServer(("127.0.0.1", 0), _Restarting) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        url = f"http://127.0.0.1:{server.server_address[1]}"
        try:
            result = run("jobs", "logs", "-f", "ftjob-1", "--url", url)
        finally:
            server.shutdown()
            thread.join()
    assert "was cancelled" in result.stderr
    assert len(result.stdout.splitlines()) == 2
    assert ["after=e0" in path for path in _Restarting.sent] == [False, True]


def test_a_server_that_was_never_there_is_not_waited_for() -> None:
    began = time.monotonic()
    result = run("jobs", "logs", "-f", "ftjob-1", "--url", "http://127.0.0.1:1")
    assert_three_lines(result, "gossamer up")
    assert time.monotonic() - began < 5


def test_a_failed_job_is_an_error(live: Live, hand: Hand, data: Path) -> None:
    job = create(live, data, "--name", "failing")
    hand.take(job["id"])
    why = "The training_file cannot be used (line 3, completion): it is missing."
    hand.fail(JobError("invalid_training_file", why, "training_file"))
    result = run("jobs", "logs", "-f", job["id"], env=live.env)
    assert result.exit_code == 1
    assert result.stderr.splitlines() == [
        f"Error: The job {job['id']} failed.",
        why,
        "Correct what the line above names, then create the job again.",
    ]
    assert f"error: The job failed: {why}" in result.stdout
    assert run("jobs", "logs", job["id"], env=live.env).exit_code == 0, "it is not followed"
    assert why in run("jobs", "show", job["id"], env=live.env).stdout
    result = run("jobs", "logs", "-f", job["id"], "--json", env=live.env)
    assert result.exit_code == 1
    assert json.loads(result.stdout.splitlines()[-1])["error"]["param"] == "training_file"


def test_a_cancelled_job_did_not_succeed(live: Live, hand: Hand, data: Path) -> None:
    job = create(live, data, "--name", "ended")
    run_json("jobs", "cancel", job["id"], env=live.env)
    result = run("jobs", "logs", "-f", job["id"], env=live.env)
    assert result.exit_code == 1
    assert "was cancelled" in result.stderr


def test_the_bar_is_live_on_a_terminal(live: Live, hand: Hand, data: Path) -> None:
    job = create(live, data, "--name", "drawn")
    hand.take(job["id"])
    hand.step(1)
    command = [str(GOSSAMER), "jobs", "logs", "-f", job["id"]]
    with Terminal(command, environment(**live.env)) as terminal:
        terminal.wait_for("1/4")
        hand.step(2)
        hand.evaluated(2)
        terminal.wait_for("2/4")
        hand.finish(51)
        assert terminal.finish() == 0, terminal.text
    measured = "token accuracy 25 %, exact match 12.5 %"
    for shown in ("train ", "loss 1.000", "123 tok/s", "left", "━", measured, "drawn"):
        assert shown in terminal.text, terminal.text
    assert "\x1b[" in terminal.text
    assert "Step 2/4: training" not in terminal.text, "steps are the bar's"


def test_ctrl_c_detaches_and_the_job_goes_on(live: Live, hand: Hand, data: Path) -> None:
    job = create(live, data, "--name", "detached")
    command = [str(GOSSAMER), "jobs", "logs", "-f", job["id"]]
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, env=environment(**live.env), **pipes) as process:
        assert process.stdout is not None
        assert "The job is queued" in process.stdout.readline()
        process.send_signal(signal.SIGINT)
        _, stderr = process.communicate(timeout=30)
    assert process.returncode == 130
    assert f"gossamer jobs logs -f {job['id']}" in stderr
    assert "Traceback" not in stderr
    assert run_json("jobs", "show", job["id"], env=live.env)["status"] == "queued"


def test_what_is_refused_leaves_no_file(
    live: Live, hand: Hand, data: Path, client: openai.OpenAI
) -> None:
    before = [file.id for file in client.files.list()]

    def refused(*options: str, data: str | Path = data) -> Any:
        result = run("jobs", "create", "--data", data, *options, env=live.env)
        assert [file.id for file in client.files.list()] == before
        return result

    assert_three_lines(refused("--set", "density=2"), "400", "adapter.density")
    assert_three_lines(refused("--set", "warmup=2"), "400", "hyperparameters.warmup")
    assert_three_lines(refused("--set", "nonsense=2"), "400", "nonsense")
    assert_three_lines(refused("--name", "No Such"), "400")
    assert_three_lines(refused("--set", "init_from=nobody"), "404", "nobody", "adapters ls")
    assert_three_lines(refused("--method", "magic"), "magic", "gossamer methods")
    assert_three_lines(refused("--method", "full"), "full", "sparta")
    assert_three_lines(refused(data="file-" + "0" * 24), "400", "file-000")
    assert refused("--set", "nonsense").exit_code == 2
    assert refused(data="missing.jsonl").exit_code == 2
    assert refused("--eval-data", "missing.jsonl").exit_code == 2


def test_a_job_that_is_not_there(live: Live) -> None:
    nobodys = "ftjob-" + "0" * 24
    for words in ("show", "logs", "logs -f", "cancel", "pause", "resume"):
        result = run("jobs", *words.split(), nobodys, env=live.env)
        assert_three_lines(result, "404", nobodys, "gossamer jobs ls")
    for job_id in ("a b?c=d#e", "ftjob-ø", "..%2ffiles"):
        result = run("jobs", "show", job_id, env=live.env)
        assert_three_lines(result, "404", "gossamer jobs ls")
    assert_three_lines(run("jobs", "show", "../files", env=live.env), "404")
