"""`gossamer bench` against a real server."""

from __future__ import annotations

from pathlib import Path

import pytest

from gossamer.cli.bench import figures
from gossamer.cli.load import Run, Timing
from tests.cli.running import Live, assert_three_lines, run, run_json

SMALL = ("--concurrency", "3", "--requests", "4", "--max-tokens", "6", "--rounds", "2")


@pytest.fixture(scope="module", autouse=True)
def _adapters(live: Live, tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = tmp_path_factory.mktemp("bench")
    for name, seed in (("one", 21), ("two", 22)):
        run_json("adapters", "push", name, live.adapter(folder, seed), env=live.env)


def test_every_model_is_measured_and_all_together(live: Live) -> None:
    models = ("--model", "one", "--model", "two")
    found = run_json("bench", *models, *SMALL, env=live.env)
    rows = found["models"]
    assert [row["model"] for row in rows] == ["base", "one", "two", "(together)"]
    for row in rows:
        assert row["tokens"] == 2 * 4 * 6, "every answer has exactly the tokens it was asked for"
        assert row["errors"] == 0
        assert row["tokens_per_second"] > 0
        assert 0 < row["ttft"]["p50"] <= row["ttft"]["p95"]
        assert 0 <= row["itl"]["p50"] <= row["itl"]["p99"]
    assert rows[0]["ratio"] == 1.0


def test_the_table_for_people(live: Live, tmp_path: Path) -> None:
    file = tmp_path / "prompts.txt"
    file.write_text("Count to ten\n\nSay something\n")
    result = run("bench", *SMALL, "--rounds", "1", "--prompts", file, env=live.env)
    head, row = result.stdout.splitlines()
    assert head.split()[:4] == ["MODEL", "TOK/S", "VS", "BASE"]
    assert row.split()[0] == "base"
    assert row.split()[2] == "1.00"
    assert result.stderr == ""


def test_failures_are_told(live: Live, tmp_path: Path) -> None:
    result = run("bench", "--model", "nothing", *SMALL, env=live.env)
    assert result.exit_code == 1
    assert "'nothing' does not exist" in result.stderr
    assert "Traceback" not in result.stderr
    empty = tmp_path / "empty.txt"
    empty.write_text("\n \n")
    assert_three_lines(run("bench", "--prompts", empty, env=live.env), "empty.txt")
    assert_three_lines(run("bench", "--url", "http://127.0.0.1:1"), "gossamer up")


def test_figures_are_medians_and_ratios() -> None:
    def took(seconds: float) -> Run:
        return Run(seconds, [Timing(first=0.5, gaps=[0.1, 0.3], tokens=10)])

    base, other = figures({"base": [took(1), took(2), took(100)], "a": [took(4)]})
    assert base["tokens_per_second"] == 5.0
    assert other["ratio"] == 0.5
    assert other["itl"]["p50"] == pytest.approx(0.2)
