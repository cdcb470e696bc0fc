"""`gossamer train` on a tiny base: into the data folder, over HTTP, into a file."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from gossamer.base.sources import open_base
from gossamer.cli.destination import base_table
from gossamer.cli.train import settings_of
from gossamer.store.catalog.opening import Store
from gossamer.store.catalog.views import BaseInfo
from gossamer.store.format import inspect, read
from tests.cli.running import GOSSAMER, Live, assert_three_lines, environment, run
from tests.cli.terminal import Terminal
from tests.training.support import counting_examples, write_jsonl

QUICK = ("--density", "0.05", "--max-steps", "3", "--batch-size", "8", "--device", "cpu")


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return write_jsonl(tmp_path / "examples.jsonl", counting_examples())


@pytest.fixture
def base(tiny_dir: Callable[..., Path]) -> Path:
    return tiny_dir("llama")


def train(data: Path, base: Path, folder: Path, *options: str | Path, **kwargs: Any) -> Any:
    where = ("--data", data, "--base", base, "--data-dir", folder / "data")
    return run("train", *where, *QUICK, *options, **kwargs)


def test_events_are_json_lines_and_the_file_is_an_adapter(
    data: Path, base: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out.safetensors"
    result = train(data, base, tmp_path, "--out", out, "--eval-fraction", "0.25", "--json")
    assert result.exit_code == 0, result.stderr
    assert result.stderr == ""
    events = [json.loads(line) for line in result.stdout.splitlines()]
    kinds = [event["event"] for event in events]
    assert kinds == ["started", "evaluation", *["step"] * 3, "evaluation", "finished"]
    started, finished = events[0], events[-1]
    assert started["density"]["nnz"] == events[2]["nnz"]
    assert started["density_of_model"] == pytest.approx(0.05, rel=0.01)
    assert (started["examples"], started["held_out"]) == (18, 6)
    assert finished["steps"] == 3
    assert finished["loss"] == events[4]["loss"]
    assert finished["bytes"] == out.stat().st_size
    assert finished["version"] is None
    opened = open_base(base, tmp_path / "data")
    summary = inspect(out)
    assert summary.base_fingerprint == opened.fingerprint


def test_the_result_goes_into_the_data_folder(data: Path, base: Path, tmp_path: Path) -> None:
    result = train(data, base, tmp_path, "--push", "counting", "--set", "mask_seed=7")
    assert result.exit_code == 0, result.stderr
    assert "Kept as counting:1, sha256:" in result.stdout
    assert "step 3/3" in result.stderr
    assert "\x1b" not in result.output
    assert "━" not in result.output, "no bar without a terminal"
    opened = open_base(base, tmp_path / "data")
    info = BaseInfo(opened.name, opened.fingerprint, base_table(opened))
    with Store(tmp_path / "data", info) as store:
        (version,) = store.catalog.show("default", "counting").versions
        assert version.current
        assert version.record["method"] == "sparta"
        assert "7" in json.dumps(dict(version.record))
        assert version.nnz > 0


def test_the_result_goes_to_a_server(live: Live, data: Path, base: Path, tmp_path: Path) -> None:
    out = tmp_path / "sent.safetensors"
    options = ("--push", "trained", "--url", live.url, "--key", live.key, "--out", out, "--json")
    result = train(data, base, tmp_path, *options)
    assert result.exit_code == 0, result.stderr
    finished = json.loads(result.stdout.splitlines()[-1])
    assert finished["version"]["id"] == "trained:1"
    assert finished["file"] == str(out)
    assert run("chat", "--model", "trained", "-m", "Count", env=live.env).exit_code == 0


def test_mistakes_show_before_the_training(
    live: Live, data: Path, base: Path, tiny_dir: Callable[..., Path], tmp_path: Path
) -> None:
    def refused(*options: str | Path, base: Path = base) -> Any:
        result = train(data, base, tmp_path, *options)
        assert "step" not in result.stderr
        return result

    assert refused().exit_code == 2
    assert refused("--out", "x", "--set", "nonsense").exit_code == 2
    assert refused("--out", "x", "--url", live.url).exit_code == 2
    taken = tmp_path / "taken"
    taken.write_text("mine")
    assert_three_lines(refused("--out", taken), "taken")
    assert taken.read_text() == "mine"
    assert_three_lines(refused("--out", tmp_path / "no" / "x"), "no folder")
    assert_three_lines(refused("--push", "Bad Name"), "Bad Name")
    assert_three_lines(refused("--push", "x", "--tenant", "nobody"), "nobody", "keys create")
    other = tiny_dir("llama", seed=5)
    elsewhere = ("--push", "x", "--url", live.url, "--key", live.key)
    assert_three_lines(refused(*elsewhere, base=other), "another base model")
    assert_three_lines(refused("--out", "x", "--method", "magic"), "magic")
    assert_three_lines(refused("--out", "x", "--density", "0.9"), "density")
    assert_three_lines(refused("--out", "x", "--set", "warmup=2"), "warmup")
    assert_three_lines(refused("--out", "x", "--set", "nonsense=2"), "nonsense")


def test_a_bad_line_of_the_data_is_named(base: Path, tmp_path: Path) -> None:
    rows = [*counting_examples(2), {"prompt": "x"}]
    file = write_jsonl(tmp_path / "bad.jsonl", rows)
    assert_three_lines(train(file, base, tmp_path, "--out", tmp_path / "x"), "line 3", "completion")


def test_settings_find_their_place() -> None:
    found = settings_of({"method": "sparta"}, 0.1, None, ["of=targets", "warmup=0.2"])
    assert found["parameters"] == {"density": 0.1, "of": "targets"}
    assert found["warmup"] == "0.2"


def test_the_bar_is_live_on_a_terminal(data: Path, base: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.safetensors"
    where = ["--data", data, "--base", base, "--data-dir", tmp_path / "data", "--out", out]
    command = [str(GOSSAMER), "train", *map(str, where), *QUICK]
    with Terminal(command, environment()) as terminal:
        assert terminal.finish(120) == 0, terminal.text
    for shown in ("training", "3/3", "loss", "tok/s", "left", "nnz", "MiB", "Trained 3 steps"):
        assert shown in terminal.text
    assert "\x1b[" in terminal.text
    assert "━" in terminal.text
    with out.open("rb") as file:
        assert read(file).deltas
