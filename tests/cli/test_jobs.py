"""`gossamer jobs create|ls|show|cancel|pause|resume` against a real server."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest

from tests.cli.jobs import LiveHand, create_job
from tests.cli.running import Live, assert_three_lines, run, run_json
from tests.training.support import counting_examples, write_jsonl


@pytest.fixture
def client(live: Live) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{live.url}/v1", api_key=live.key, max_retries=0) as made:
        yield made


def test_a_job_is_created_with_everything_that_was_said(
    live: Live, hand: LiveHand, data: Path, client: openai.OpenAI, tmp_path: Path
) -> None:
    run_json("adapters", "push", "first", live.adapter(tmp_path, 31), env=live.env)
    held_out = write_jsonl(tmp_path / "held.jsonl", counting_examples(3))
    sets = ("parents=first", "sparsity=0.95", "block_size=8", "n_epochs=2", "packing=true")
    options = [word for text in sets for word in ("--set", text)]
    job = create_job(
        live.env, data, "--method", "lotto", *options, "--name", "second", "--seed", "7",
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

    again = create_job(live.env, Path(job["training_file"]), "--name", "third")
    assert again["training_file"] == job["training_file"], "the id of a file that is there"

    shown = run("jobs", "show", job["id"], env=live.env).stdout
    for part in (job["id"], "queued", "second", "lotto", "sparsity=0.95", "packing=true", "first@"):
        assert part in shown
    assert 'parents=["first"]' in shown


@pytest.mark.parametrize("name", ["sparta", "lota", "mcs"])
def test_every_setting_can_be_sent_as_it_is_listed(
    live: Live, hand: LiveHand, data: Path, name: str
) -> None:
    """The server reads JSON strictly: texts must have become numbers on the way."""
    document = run_json("methods", name)
    options = []
    for field in (*document["parameters"], *document["settings"]):
        default = json.loads(field["default"])
        text = default if isinstance(default, str) else field["default"]
        options += ["--set", f"{field['name']}={text}"]
    job = create_job(live.env, data, "--method", name, *options)
    assert job["adapter"]["method"] == name


def test_jobs_are_listed_and_steered(live: Live, hand: LiveHand, data: Path) -> None:
    jobs = [create_job(live.env, data, "--name", f"listed-{i}") for i in range(3)]
    listed = run_json("jobs", "ls", "--limit", "2", env=live.env)
    assert [job["id"] for job in listed["data"]] == [jobs[2]["id"], jobs[1]["id"]]
    assert listed["has_more"] is True
    head, first, *_ = run("jobs", "ls", env=live.env).stdout.splitlines()
    assert head.split() == ["ID", "STATUS", "METHOD", "ADAPTER", "STEP", "CREATED"]
    assert first.split()[:5] == [jobs[2]["id"], "queued", "sparta", "listed-2", "-"]
    unnamed = create_job(live.env, data)
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


def test_a_page_is_not_the_end(live: Live, hand: LiveHand, data: Path) -> None:
    job = create_job(live.env, data, "--name", "paged")
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


def test_what_is_refused_leaves_no_file(
    live: Live, hand: LiveHand, data: Path, client: openai.OpenAI
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
