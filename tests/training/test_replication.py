"""The replication bench: intervals against theory, runs that resume, tables of known results."""

from __future__ import annotations

import importlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gossamer.base.load import BaseFiles
from tests.training.support import counting_examples

ROOT = Path(__file__).parents[2]


def bench(module: str) -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(ROOT)
        return importlib.import_module(f"benchmarks.{module}")


# -- intervals


def test_the_interval_of_a_mean_is_that_of_the_normal_law() -> None:
    intervals = bench("replication.intervals")
    generator = np.random.default_rng(1)
    right = {seed: generator.random(400) < 0.7 for seed in (1, 2, 3)}
    found = intervals.interval(right)
    pooled = np.concatenate(list(right.values()))
    half = 1.96 * np.sqrt(0.7 * 0.3 / 1200)
    assert found.mean == pytest.approx(pooled.mean())
    assert found.high - found.mean == pytest.approx(half, rel=0.1)
    assert found.mean - found.low == pytest.approx(half, rel=0.1)
    assert found.seeds == {seed: pytest.approx(right[seed].mean()) for seed in right}


def test_pairs_tell_what_two_means_do_not() -> None:
    intervals = bench("replication.intervals")
    generator = np.random.default_rng(2)
    one = {seed: generator.random(200) < 0.5 for seed in (1, 2, 3)}
    better = {seed: right.copy() for seed, right in one.items()}
    for right in better.values():
        right[np.flatnonzero(~right)[:8]] = True
    found = intervals.difference(better, one)
    assert found.mean == pytest.approx(0.04)
    assert found.excludes_zero
    apart = {seed: generator.permutation(right) for seed, right in better.items()}
    assert not intervals.difference(apart, one).excludes_zero
    assert not intervals.difference(one, one).excludes_zero


def test_what_cannot_be_paired_is_refused() -> None:
    intervals = bench("replication.intervals")
    with pytest.raises(ValueError, match="not the same"):
        intervals.difference({1: np.ones(3)}, {1: np.ones(4)})
    with pytest.raises(ValueError, match="no values"):
        intervals.difference({1: np.ones(3)}, {2: np.ones(3)})


# -- the plan


def test_the_plan_has_every_run_once_and_parents_first() -> None:
    plan = bench("replication.plan")
    runs = plan.planned(plan.EXPERIMENTS, plan.SEEDS)
    keys = [run.key for run in runs]
    assert len(set(keys)) == len(keys)
    for place, run in enumerate(runs):
        if run.after is not None:
            siblings = {r.key for r in runs[:place] if r.after and r.after.key == run.after.key}
            between = keys[keys.index(run.after.key) + 1 : place]
            assert set(between) == siblings, "something else is between a parent and its child"
    # one name, one way to train
    arms = {run.arm.name: run.arm for run in runs}
    assert all(run.arm == arms[run.arm.name] for run in runs)


# -- runs


@pytest.fixture
def made(base: BaseFiles, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A function that makes a runner of two small tasks on the tiny base."""
    running, tasks = bench("replication.running"), bench("tasks")
    plan = importlib.import_module(running.Run.__module__)
    monkeypatch.setattr(plan, "BATCH", 4)

    def task(name: str) -> Any:
        def make(cache: Path, seed: int, held_out: int) -> Any:
            rows = counting_examples(24)
            rows = rows[seed:] + rows[:seed]
            items = [
                tasks.Item(f"{name} {r['prompt']}", r["completion"], (" three", " one two"))
                for r in rows
            ]
            return tasks.Task(name, name, items[held_out:], items[:held_out], 4, tasks.is_exactly)

        return make

    names = {name: task(name) for name in plan.TASKS}
    return lambda: running.Runner(
        base, tmp_path, tmp_path / "results.csv", tasks=names, examples=8, held_out=9
    )


def _quick(arm: Any, **parameters: Any) -> Any:
    settings = {"learning_rate": 1e-2, "device": "cpu"}
    return replace(arm, settings=settings, parameters={**arm.parameters, **parameters})


def test_runs_are_kept_and_a_chain_is_judged_on_both_tasks(made: Any) -> None:
    plan, running = bench("replication.plan"), bench("replication.running")
    first, second = plan.TASKS
    parent = plan.Run(_quick(plan.LOTA_90), first, 1)
    child = plan.Run(_quick(plan.LOTTO_90), second, 1, after=parent)
    runs = [plan.Run(plan.BASE, first, 1), plan.Run(plan.CHOICE, first, 1), parent, child]
    runner = made()
    assert runner.missing(runs) == runs
    lines = [line for run in runs for line in runner.run(run)]
    assert [line["judged"] for line in lines] == [first, first, first, second, first]
    for line in lines:
        right = running.unpacked(line)
        assert len(right) == 9
        assert float(line["accuracy"]) == pytest.approx(right.mean(), abs=1e-4)
    assert lines[-1]["after"] == parent.key
    assert int(lines[2]["trained"]) > 0

    again = made()
    assert again.missing(runs) == []
    # a new process has the parent's lines but not its adapter, and makes it again
    other = replace(child, arm=replace(child.arm, name="lotto again"))
    (own, before) = again.run(other)
    same = {"accuracy", "loss", "outcomes", "trained"}
    assert {key: own[key] for key in same} == {key: lines[3][key] for key in same}
    assert {key: before[key] for key in same} == {key: lines[4][key] for key in same}
    kept = bench("common").read_csv(again._results)
    assert len(kept) == 7


def test_a_run_that_would_be_another_one_is_not_taken_for_done(made: Any) -> None:
    plan = bench("replication.plan")
    run = plan.Run(_quick(plan.SPARTA_MAIN, density=0.1), plan.TASKS[0], 1)
    made().run(run)
    assert made().missing([run]) == []
    settings = {**run.arm.settings, "learning_rate": 2e-2}
    other = replace(run, arm=replace(run.arm, settings=settings))
    with pytest.raises(ValueError, match="another settings"):
        made().missing([other])


@pytest.mark.parametrize("name", ["FULL", "LORA_8", "LOTA_99_STAR", "SPARTA_MAIN", "MCS_MAIN"])
def test_every_arm_trains_and_the_base_stays_as_it_was(made: Any, name: str) -> None:
    plan = bench("replication.plan")
    runner = made()
    task = plan.TASKS[0]
    (before,) = runner.run(plan.Run(plan.BASE, task, 1))
    arm = getattr(plan, name)
    quick = {"density": 0.1} if name == "SPARTA_MAIN" else {}
    quick = {"warmup_steps": 1} if name == "MCS_MAIN" else quick
    (line,) = runner.run(plan.Run(_quick(arm, **quick), task, 1))
    assert line["loss"] != before["loss"]
    (after,) = runner.run(plan.Run(plan.BASE, task, 2))
    (third,) = made().run(plan.Run(plan.BASE, task, 2))
    assert after["loss"] == third["loss"]


# -- the report


def test_the_tables_say_what_the_lines_say(tmp_path: Path) -> None:
    plan, report, running = (
        bench("replication.plan"), bench("replication.report"), bench("replication.running"),
    )  # fmt: skip

    def line(arm: Any, task: str, right: list[bool], after: str = "", judged: str = "") -> Any:
        return {
            "arm": arm.name, "task": task, "seed": "1", "after": after, "judged": judged or task,
            "held_out": str(len(right)), "outcomes": running.packed(right), "trained": "7",
            "seconds": "90", "foreign": "0.01", "accuracy": "0", "loss": "0",
        }  # fmt: skip

    first, second = plan.TASKS
    parent = f"{plan.LOTA_90.name}@{first}#1"
    results = report.Results([
        line(plan.LOTA_90, first, [True] * 9 + [False]),
        line(plan.LOTTO_90, second, [True] * 10, parent),
        line(plan.LOTTO_90, second, [True] * 4 + [False] * 6, parent, first),
        line(plan.LOTA_90, second, [True] * 8 + [False] * 2),
    ])  # fmt: skip
    forgotten = report.forgetting(results).splitlines()
    (row,) = [r for r in forgotten if f"{first}, then" in r and "lotto" in r]
    cells = [cell.strip() for cell in row.strip("|").split("|")]
    assert cells[2].startswith("0.900")
    assert cells[3].startswith("0.400")
    assert cells[4].startswith("**-0.500")
    assert cells[5].startswith("1.000")
    assert cells[6].startswith("+0.200")
    gains = report.gains(results)
    assert "**1.00** (1.00)" in gains
    assert "**0.90** (0.90)" in gains
    assert report.MISSING in gains
    assert all(path.stat().st_size > 1000 for path in report.draw(results, tmp_path))


def test_the_pages_are_current() -> None:
    report, common = bench("replication.report"), bench("common")
    results = report.Results(common.read_csv(common.RESULTS / "replication.csv"))
    page, readme = report.PAGE.read_text(), report.README.read_text()
    assert report.page_of(results, page) == page, "run: python -m benchmarks.replication report"
    assert common.replaced(readme, "gains", report.gains(results)) == readme
    for name in report.PLOTTED:
        drawn = f"plots/replication-{name}.png"
        assert (report.PAGE.parent / drawn).is_file() == (drawn in page)
