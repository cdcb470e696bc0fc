"""`gossamer train` on a tiny base: into the data folder, over HTTP, into a file."""

from __future__ import annotations

import json
import signal
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gossamer.base.sources import open_base
from gossamer.cli.stores import base_table
from gossamer.cli.train import settings_of
from gossamer.store.catalog.opening import Store
from gossamer.store.catalog.views import BaseInfo, VersionInfo
from gossamer.store.format import digest, inspect, read
from tests.cli.running import GOSSAMER, Live, assert_three_lines, environment, run
from tests.cli.terminal import Terminal
from tests.training.support import counting_examples, write_jsonl

SHORT = ("--max-steps", "3", "--batch-size", "8", "--device", "cpu")
QUICK = ("--density", "0.05", *SHORT)


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
    assert found["warmup"] == 0.2


def events_of(result: Any) -> list[dict[str, Any]]:
    assert result.exit_code == 0, result.stderr
    return [json.loads(line) for line in result.stdout.splitlines()]


def test_phases_are_told(data: Path, base: Path, tmp_path: Path) -> None:
    where = ("--data", data, "--base", base, "--data-dir", tmp_path / "data", *SHORT)
    sets = ("--method", "lota", "--set", "calibration_steps=2", "--out", tmp_path / "a")
    started, *events = events_of(run("train", *where, *sets, "--json"))
    assert started["phases"] == {"calibrate-1": 2, "train": 3}
    phases = [event["phase"] for event in events if event["event"] == "step"]
    assert phases == ["calibrate-1"] * 2 + ["train"] * 3

    told = run("train", *where, *sets[:-1], tmp_path / "b")
    assert "Steps: calibrate-1 2, then train 3." in told.stderr
    assert "step 1/5  calibrate-1  loss" in told.stderr
    assert "step 5/5  train  loss" in told.stderr


def test_the_low_rank_baseline(data: Path, base: Path, tmp_path: Path) -> None:
    where = ("--data", data, "--base", base, "--data-dir", tmp_path / "data", *SHORT)
    sets = ("--method", "lora", "--set", "rank=4", "--set", "targets=v", "--eval-data", data)
    events = events_of(run("train", *where, *sets, "--out", tmp_path / "a", "--json"))
    started, finished = events[0], events[-1]
    with (tmp_path / "a").open("rb") as file:
        made = read(file)
    values = sum(4 * sum(delta.shape) for delta in made.deltas.values())
    assert started["density"]["nnz"] == made.record["low_rank"]["values"] == values
    assert finished["nnz"] == sum(delta.dense().size for delta in made.deltas.values())
    assert finished["digest"] == digest(made)
    shares = [event["exact_match"] for event in events if event["event"] == "evaluation"]
    assert shares == [one["exact_match"] for one in finished["evaluations"]]

    told = run("train", *where, *sets, "--out", tmp_path / "b")
    assert f"lora: {values:,} values in 3 weights" in told.stderr
    assert f"  {values:,} nnz  " in told.stderr
    assert "exact match 0 %" in told.stderr
    assert ", exact match 0 % → " in told.stdout


def test_a_run_begins_with_files_and_with_adapters_of_the_data_folder(
    data: Path, base: Path, tmp_path: Path
) -> None:
    """A chain of three: the second refers to a name, the third to a name and a file."""
    where = ("--data", data, "--base", base, "--data-dir", tmp_path / "data", *SHORT)
    sparsity = ("--set", "sparsity=0.9", "--set", "calibration_steps=1")

    def finished(*options: str | Path) -> dict[str, Any]:
        return events_of(run("train", *where, *options, *sparsity, "--json"))[-1]

    one = finished("--method", "lota", "--push", "one")
    two = ("--method", "lotto", "--set", "parents=one", "--out", tmp_path / "two.safetensors")
    finished(*two)
    files = ("--adapter", f"second={tmp_path / 'two.safetensors'}")
    finished(
        *("--method", "lotto", "--set", "parents=one,second", *files),
        *("--out", tmp_path / "three.safetensors"),
    )
    with (tmp_path / "three.safetensors").open("rb") as file:
        three = read(file)
    with (tmp_path / "two.safetensors").open("rb") as file:
        second = read(file)
    assert [link["digest"] for link in three.record["chain"]] == [digest(second)]
    assert [link["digest"] for link in second.record["chain"]] == [one["digest"]]
    assert 2 * one["nnz"] == second.nnz
    assert 3 * one["nnz"] == three.nnz
    for name, delta in second.deltas.items():
        where_two, values_two = delta.elements()
        where_three, values_three = three.deltas[name].elements()
        kept = np.isin(where_three, where_two)
        np.testing.assert_array_equal(values_three[kept], values_two)


def test_a_run_begins_with_a_mix_of_files_alone(data: Path, base: Path, tmp_path: Path) -> None:
    file = tmp_path / "a.safetensors"
    assert train(data, base, tmp_path, "--out", file).exit_code == 0
    options = ("--set", "init_from=a*0.5+b*0.5", "--adapter", f"a={file}", "--adapter", f"b={file}")
    where = ("--data", data, "--base", base, "--data-dir", tmp_path / "elsewhere", *SHORT)
    out = tmp_path / "b.safetensors"
    finished = events_of(run("train", *where, *options, "--out", out, "--json"))[-1]
    with file.open("rb") as first, out.open("rb") as second:
        begun, made = read(first), read(second)
    assert made.record["init_from"]["digest"] == digest(begun), "half and half of one adapter is it"
    assert finished["nnz"] == begun.nnz
    assert not (tmp_path / "elsewhere" / "registry.sqlite3").exists(), "no store was needed"


def test_references_that_mean_nothing_are_refused(data: Path, base: Path, tmp_path: Path) -> None:
    junk = tmp_path / "junk"
    junk.write_bytes(b"junk" * 100)

    def refused(*options: str | Path) -> Any:
        return train(data, base, tmp_path, "--out", tmp_path / "x", *options)

    init = ("--set", "init_from=a", "--set", "init_positions=select")
    assert_three_lines(refused(*init), "'a'", "none of this name")
    assert_three_lines(refused(*init, "--tenant", "nobody"), "none of this name")
    assert_three_lines(refused(*init, "--adapter", f"a={junk}"), "junk", "no adapter file")
    for wrong in ("a", "=x", "a=", f"b={junk}", f"a={tmp_path / 'missing'}", f"a={tmp_path}"):
        result = refused(*init, "--adapter", wrong)
        assert result.exit_code == 2, wrong
        assert "--adapter" in result.stderr
    twice = ("--adapter", f"a={junk}", "--adapter", f"a={junk}")
    assert refused(*init, *twice).exit_code == 2
    assert refused("--set", "checkpoint_steps=1").exit_code == 2, "there is nowhere to keep them"


def kept_versions(data_dir: Path, base: Path) -> Sequence[VersionInfo]:
    opened = open_base(base, data_dir)
    with Store(data_dir, BaseInfo(opened.name, opened.fingerprint, base_table(opened))) as store:
        return store.catalog.show("default", "kept").versions


def test_checkpoints_can_be_tried(data: Path, base: Path, tmp_path: Path) -> None:
    result = train(data, base, tmp_path, "--push", "kept", "--set", "checkpoint_steps=1")
    assert result.exit_code == 0, result.stderr
    versions = kept_versions(tmp_path / "data", base)
    tags = [version.tag for version in versions if version.tag is not None]
    assert tags[:2] == ["step-1", "step-2"]
    assert [version.label for version in versions if version.current] == ["kept:1"]


def test_the_last_checkpoints_are_kept(
    data: Path, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GOSSAMER_LIMITS__CHECKPOINTS_PER_JOB", "2")
    steps = ("--set", "checkpoint_steps=1", "--max-steps", "5")
    result = train(data, base, tmp_path, "--push", "kept", *steps)
    assert result.exit_code == 0, result.stderr
    labels = [version.label for version in kept_versions(tmp_path / "data", base)]
    assert labels == ["kept@step-3", "kept@step-4", "kept:1"]


@pytest.mark.gate
def test_an_interrupted_run_goes_on(data: Path, base: Path, tmp_path: Path) -> None:
    def arguments(out: str, *options: str | Path) -> list[str]:
        where = ("--data", data, "--base", base, "--data-dir", tmp_path / "data")
        steps = ("--set", "density=0.05", "--max-steps", "100", "--batch-size", "8")
        device = ("--device", "cpu", "--threads", "1", "--json")
        return [*map(str, ("train", *where, *steps, *device, *options, "--out", tmp_path / out))]

    work = ("--work", tmp_path / "work")
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    command = [str(GOSSAMER), *arguments("a", *work)]
    with subprocess.Popen(command, env=environment(), **pipes) as process:
        assert process.stdout is not None
        while '"step": 3,' not in (line := process.stdout.readline()):
            assert line, "the run ended before it could be stopped"
        process.send_signal(signal.SIGINT)
        _, stderr = process.communicate(timeout=60)
    assert process.returncode == 130, stderr
    assert "Traceback" not in stderr
    assert not (tmp_path / "a").exists()

    resumed = events_of(run(*arguments("a", *work)))
    whole = events_of(run(*arguments("b")))
    assert resumed[1]["step"] > 3, "it goes on where it was"
    assert resumed[-1]["digest"] == whole[-1]["digest"]
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    assert_three_lines(run(*arguments("c", *work, "--seed", "3")), "other settings")


def test_the_bar_is_live_on_a_terminal(data: Path, base: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.safetensors"
    where = ["--data", data, "--base", base, "--data-dir", tmp_path / "data", "--out", out]
    method = ["--method", "lota", "--set", "calibration_steps=2"]
    command = [str(GOSSAMER), "train", *map(str, where), *SHORT, *method]
    with Terminal(command, environment()) as terminal:
        assert terminal.finish(120) == 0, terminal.text
    for shown in ("calibrate-1", "train ", "5/5", "loss", "tok/s", "left", "nnz", "MiB"):
        assert shown in terminal.text
    assert "Trained 5 steps" in terminal.text
    assert "\x1b[" in terminal.text
    assert "━" in terminal.text
    with out.open("rb") as file:
        assert read(file).deltas
