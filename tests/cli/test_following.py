"""`gossamer jobs logs -f` and `jobs create --wait`: what is told of a job until it ends."""

from __future__ import annotations

import json
import signal
import subprocess
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, ClassVar

from gossamer.jobs.views import JobError
from tests.cli.jobs import LiveHand, create_job
from tests.cli.running import GOSSAMER, Live, assert_three_lines, environment, run, run_json
from tests.cli.stand_ins import StandIn, standing_in
from tests.cli.terminal import Terminal


def test_a_job_is_waited_for(live: Live, hand: LiveHand, data: Path) -> None:
    def work() -> None:
        while not hand.take_next():
            time.sleep(0.05)
        for step in (1, 2):
            hand.step(step, 2)
        hand.evaluated(2)
        time.sleep(1.2)  # the command looks in between
        hand.finish(41)

    options = ("--data", data, "--name", "waited", "--wait")
    with ThreadPoolExecutor(1) as pool:
        worked = pool.submit(work)
        result = run("jobs", "create", *options, "--json", env=live.env)
        worked.result()
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


def test_a_failed_job_is_an_error(live: Live, hand: LiveHand, data: Path) -> None:
    job = create_job(live.env, data, "--name", "failing")
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


def test_a_cancelled_job_did_not_succeed(live: Live, hand: LiveHand, data: Path) -> None:
    job = create_job(live.env, data, "--name", "ended")
    run_json("jobs", "cancel", job["id"], env=live.env)
    result = run("jobs", "logs", "-f", job["id"], env=live.env)
    assert result.exit_code == 1
    assert "was cancelled" in result.stderr


def test_the_bar_is_live_on_a_terminal(live: Live, hand: LiveHand, data: Path) -> None:
    job = create_job(live.env, data, "--name", "drawn")
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


def test_ctrl_c_detaches_and_the_job_goes_on(live: Live, hand: LiveHand, data: Path) -> None:
    job = create_job(live.env, data, "--name", "detached")
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


# ---- a server that is away


class Restarting(StandIn):
    """A server that is away for a while, in both ways of being so."""

    requests = 0
    sent: ClassVar[list[str]] = []

    def reply(self) -> None:
        type(self).requests += 1
        if self.requests == 3:
            self.close_connection = True  # without a word
            return
        status, document = 200, self._document()
        if self.requests == 4:
            error = {"message": "It stops.", "type": "server_error", "code": None, "param": None}
            status, document = 503, {"error": error}
        self.answer(json.dumps(document).encode(), status)

    def _document(self) -> dict[str, Any]:
        finished = self.requests > 4
        if "/events" not in self.path:
            status = "cancelled" if finished else "running"
            return {"id": "ftjob-1", "status": status, "fine_tuned_model": None}
        self.sent.append(self.path)
        event = {"id": f"e{finished:d}", "created_at": 1, "level": "info", "message": "m"}
        return {"data": [{**event, "data": None}], "has_more": False}


def test_a_server_that_starts_anew_is_waited_for() -> None:
    with standing_in(Restarting) as url:
        result = run("jobs", "logs", "-f", "ftjob-1", "--url", url)
    assert "was cancelled" in result.stderr
    assert len(result.stdout.splitlines()) == 2
    assert ["after=e0" in path for path in Restarting.sent] == [False, True]


def test_a_server_that_was_never_there_is_not_waited_for() -> None:
    began = time.monotonic()
    result = run("jobs", "logs", "-f", "ftjob-1", "--url", "http://127.0.0.1:1")
    assert_three_lines(result, "gossamer up")
    assert time.monotonic() - began < 5
