"""A run that is stopped or killed, and goes on, is the run that was not."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from torch.optim.optimizer import register_optimizer_step_post_hook

from gossamer.base.load import BaseFiles
from gossamer.store.delta import DeltaSet
from gossamer.store.format import digest
from gossamer.training import Evaluation, Silent, Step
from gossamer.training.checkpoints import FORMAT, Result, WorkFolder
from gossamer.training.errors import StoppedError, WorkFolderError
from gossamer.training.run import TrainResult
from tests.training.support import counting_examples, run_of, write_jsonl

ROOT = Path(__file__).parents[2]
KILLED = 9
SELECT = {"targets": "q,k", "calibration_steps": 2}
RANDOM = {"targets": "q,k", "mask": "random"}
GIVEN = {"targets": "q,k", "mask_from": "a"}
RUNS: list[tuple[str, dict[str, Any]]] = [
    ("sparta", {"density": 0.02}),
    ("lota", SELECT),
    ("lota", {**SELECT, "sparsity": 0.99, "iterations": 2, "block_size": 8}),
    ("lotto", {**SELECT, "parents": ["a"]}),
    ("mcs", {"period": 1, "score": "grow_drop", "targets": "q"}),
    ("full", {"targets": "q"}),
    ("lora", {"targets": "q", "init_from": "a"}),
]
IDS = ["sparta", "lota", "lota-iterated", "lotto", "mcs", "full", "lora"]


@pytest.fixture(scope="module")
def parent(base: BaseFiles, data: Path) -> DeltaSet:
    return run_of(base, data, "lota", RANDOM, max_steps=1).delta_set


class StopAfter:
    """Stop after so many steps of each attempt, whenever it is asked."""

    def __init__(self, steps: int) -> None:
        self.steps = steps
        self._hook = register_optimizer_step_post_hook(self._count)

    def _count(self, *_: object) -> None:
        self.steps -= 1

    def __call__(self) -> bool:
        return self.steps <= 0

    def __enter__(self) -> StopAfter:
        return self

    def __exit__(self, *_: object) -> None:
        self._hook.remove()


class Steps(Silent):
    """The steps that were made and the evaluations, by number, and the tokens that were told."""

    def __init__(self) -> None:
        self.seen: list[int] = []
        self.evaluations: list[int] = []
        self.tokens: list[int] = []

    def stepped(self, event: Step) -> None:
        self.seen.append(event.step)
        self.tokens.append(event.tokens)

    def evaluated(self, event: Evaluation) -> None:
        self.evaluations.append(event.step)


def in_pieces(
    folder: Path, after: int, run: Callable[..., TrainResult]
) -> tuple[TrainResult, Steps]:
    """Stop after every so many steps, and go on."""
    steps = Steps()
    for _ in range(40):
        try:
            with StopAfter(after) as stop:
                return run(folder=folder, stop=stop, watcher=steps), steps
        except StoppedError as error:
            stopped = error
        assert stopped.resumable
        assert stopped.step == steps.seen[-1]
    raise AssertionError("it never ends")


def assert_same(one: TrainResult, other: TrainResult) -> None:
    assert list(one.losses) == list(other.losses)
    assert one.evaluations == other.evaluations
    assert digest(one.delta_set) == digest(other.delta_set)
    assert one.record == other.record
    assert one.tokens == other.tokens


@pytest.mark.parametrize(("method", "parameters"), RUNS, ids=IDS)
def test_stopped_after_any_step_it_goes_on(
    method: str, parameters: dict[str, Any], base: BaseFiles, data: Path, parent: DeltaSet,
    tmp_path: Path,
) -> None:  # fmt: skip
    def run(**given: Any) -> TrainResult:
        return run_of(
            base, data, method, parameters, adapters={"a": parent}, batch_size=4, max_steps=4,
            eval_data=data, eval_steps=2, schedule="cosine", value_dtype="F32", **given,
        )  # fmt: skip

    whole = run()
    count = len(whole.losses)
    for after in (1, 3) if method == "mcs" or parameters is SELECT else (1,):
        result, steps = in_pieces(tmp_path / str(after), after, run)
        assert_same(result, whole)
        assert steps.seen == list(range(1, count + 1))  # none twice, and none left out
        assert steps.evaluations == [made.step for made in whole.evaluations]
        assert steps.tokens == sorted(set(steps.tokens))
        assert steps.tokens[-1] == whole.tokens
    again = run(folder=tmp_path / "1")  # it has ended: nothing is left to do
    assert_same(again, whole)
    if method == "mcs":
        other = run(seed=1)
        with pytest.raises(AssertionError):
            assert_same(other, whole)


def test_accumulated_packed_16_bit_steps_are_resumed_too(
    base: BaseFiles, data: Path, tmp_path: Path
) -> None:
    def run(**given: Any) -> TrainResult:
        return run_of(
            base, data, "lota", SELECT, batch_size=2, gradient_accumulation=2, packing=True,
            precision="bf16", gradient_checkpointing=True, max_steps=4, optimizer="adamw", **given,
        )  # fmt: skip

    result, steps = in_pieces(tmp_path, 1, run)
    assert_same(result, run())
    assert steps.seen == [1, 2, 3, 4, 5, 6]


class StopInEvaluation:
    """Stop when it is asked for the second time since a step: in the midst of an evaluation."""

    def __init__(self, steps: Steps, step: int) -> None:
        self._steps, self._step = steps, step
        self._asked = 0

    def __call__(self) -> bool:
        made = self._steps.seen[-1] if self._steps.seen else 0
        self._asked = self._asked + 1 if made == self._step else 0
        return self._asked >= 2


@pytest.mark.parametrize("step", [0, 2, 3, 5])
@pytest.mark.parametrize("method", ["sparta", "lota"])
def test_stopped_in_an_evaluation_it_goes_on_with_it(
    method: str, step: int, base: BaseFiles, data: Path, tmp_path: Path
) -> None:
    """Before the first step, on the way, on the way at a checkpoint, and after the last step."""
    parameters = SELECT if method == "lota" else {}
    before = 2 if method == "lota" else 0
    step = step + before if step else 0
    kept: list[tuple[int, float | None]] = []

    def run(**given: Any) -> TrainResult:
        return run_of(
            base, data, method, parameters, max_steps=5, eval_data=data, eval_steps=1,
            batch_size=3, checkpoint_steps=3,
            keep=lambda at, _, metrics: kept.append((at, metrics.get("valid_loss"))), **given,
        )  # fmt: skip

    whole = run()
    expected = kept.copy()
    kept.clear()
    steps = Steps()
    with pytest.raises(StoppedError) as caught:
        run(folder=tmp_path, stop=StopInEvaluation(steps, step), watcher=steps)
    assert (caught.value.step, caught.value.resumable) == (step, True)
    assert steps.evaluations == [made.step for made in whole.evaluations if made.step < step]
    assert not any(at == step for at, _ in kept), "it is kept with what the evaluation says"
    # As long as somebody wants it stopped it makes nothing, and loses nothing.
    with pytest.raises(StoppedError) as caught:
        run(folder=tmp_path, stop=lambda: True, watcher=steps)
    assert (caught.value.step, caught.value.resumable) == (step, True)
    result = run(folder=tmp_path, watcher=steps)
    assert_same(result, whole)
    assert result.losses[-1] == whole.losses[-1]
    assert steps.seen == list(range(1, len(whole.losses) + 1))
    assert steps.evaluations == [made.step for made in whole.evaluations]
    assert kept == expected


def test_a_stop_without_a_folder_says_that_it_cannot_go_on(base: BaseFiles, data: Path) -> None:
    with pytest.raises(StoppedError) as caught, StopAfter(2) as stop:
        run_of(base, data, "sparta", {}, stop=stop)
    assert (caught.value.step, caught.value.resumable) == (2, False)


def test_a_folder_of_another_run_is_refused(
    base: BaseFiles, data: Path, parent: DeltaSet, tmp_path: Path
) -> None:
    def run(**given: Any) -> TrainResult:
        chosen = {"parameters": GIVEN, "adapters": {"a": parent}, **given}
        return run_of(
            base, chosen.pop("file", data), "lota", folder=tmp_path, max_steps=2, **chosen
        )

    with pytest.raises(StoppedError), StopAfter(1) as stop:
        run(stop=stop)
    before = sorted(tmp_path.rglob("*"))
    more = write_jsonl(tmp_path.with_name("more.jsonl"), counting_examples(13))
    other = run_of(base, data, "lota", RANDOM, max_steps=1, seed=3)
    for given in (
        {"learning_rate": 1e-3},
        {"seed": 1},
        {"parameters": {**GIVEN, "targets": "q"}},
        {"file": more},
        {"adapters": {"a": other.delta_set}},  # the name has come to mean another version
    ):
        with pytest.raises(WorkFolderError) as caught:
            run(**given)
        assert caught.value.path == tmp_path
    assert sorted(tmp_path.rglob("*")) == before
    run()


def test_a_folder_of_another_version_of_the_program_is_refused(
    base: BaseFiles, data: Path, tmp_path: Path
) -> None:
    """Not read with a crash: its evaluations lack what ours have."""

    def run(**given: Any) -> TrainResult:
        return run_of(base, data, "sparta", {}, folder=tmp_path, eval_data=data, **given)

    with pytest.raises(StoppedError), StopAfter(1) as stop:
        run(stop=stop)
    known = tmp_path / "run.json"
    identity = known.read_text()
    older = json.loads(identity)
    assert older.pop("format") == FORMAT
    for found in (older, {**older, "format": FORMAT + 1}):
        known.write_text(json.dumps(found, sort_keys=True))
        with pytest.raises(WorkFolderError, match="another version") as caught:
            run()
        assert caught.value.path == tmp_path
    known.write_text(identity)
    run()


def test_what_has_no_mark_is_not_read(tmp_path: Path) -> None:
    """Neither a checkpoint that was being written nor a result."""
    phase = WorkFolder(tmp_path, {}).phase("train")
    for step in (3, 10, 9):
        (tmp_path / "train" / f"checkpoint-{step}").mkdir()
        (tmp_path / "train" / f"checkpoint-{step}" / "history.json").write_text("{}")
    assert phase.latest() is None
    phase.seal(9, {"step": 9})
    (tmp_path / "train" / "checkpoint-10").mkdir()
    assert phase.latest() == (tmp_path / "train" / "checkpoint-9", {"step": 9})
    phase.seal(10, {"step": 10})
    assert phase.latest() == (tmp_path / "train" / "checkpoint-10", {"step": 10})
    assert [path.name for path in (tmp_path / "train").iterdir()] == ["checkpoint-10"]
    assert phase.result() is None
    phase.finish(Result({}, {"a": 1}))
    found = WorkFolder(tmp_path, {}).phase("train").result()
    assert found is not None
    assert found.notes == {"a": 1}
    (tmp_path / "train" / "complete").unlink()
    assert phase.result() is None


Attempt = Callable[..., dict[str, Any]]


@pytest.fixture(scope="module")
def attempt(base: BaseFiles, data: Path) -> Iterator[Attempt]:
    """`attempt(folder, kill)`: one run in a process of its own; see `kill_child`."""
    with subprocess.Popen(
        [sys.executable, "-W", "ignore", "-m", "tests.training.kill_child"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=ROOT,
    ) as child:
        stdin, stdout = child.stdin, child.stdout
        assert stdin is not None
        assert stdout is not None

        def one(folder: Path, kill: tuple[str, int] | None = None, **given: Any) -> dict[str, Any]:
            settings = {"batch_size": 4, "max_steps": 3, "learning_rate": 1e-2, "device": "cpu"}
            job = {
                "base": str(base.path),
                "fingerprint": base.fingerprint,
                "data": str(data),
                "method": "lota",
                "parameters": SELECT,
                "settings": {**settings, "eval_data": str(data), "value_dtype": "F32"},
                "folder": str(folder),
                "kill": kill,
                **given,
            }
            stdin.write(json.dumps(job) + "\n")
            stdin.flush()
            report: dict[str, Any] = json.loads(stdout.readline())
            return report

        yield one


def outcome(report: dict[str, Any]) -> dict[str, Any]:
    """What a run makes, however often it was killed on the way."""
    assert report["status"] == 0
    return {key: report[key] for key in ("digest", "losses", "evaluations", "record")}


@pytest.fixture(scope="module")
def unkilled(attempt: Attempt, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return attempt(tmp_path_factory.mktemp("unkilled"))


@pytest.mark.parametrize("kills", [6, pytest.param(10**6, marks=pytest.mark.gate)])
def test_killed_at_any_use_of_its_files_it_goes_on(
    kills: int, attempt: Attempt, unkilled: dict[str, Any], tmp_path: Path
) -> None:
    """Between the files of a checkpoint, before and after its mark, while old ones are removed."""
    moments = unkilled["files"]
    assert moments > 80
    assert unkilled["updates"] == 5
    left = []
    for moment in sorted({*range(1, moments, max(1, moments // kills)), moments}):
        folder = tmp_path / str(moment)
        assert attempt(folder, ("file", moment))["status"] == KILLED
        resumed = attempt(folder)
        assert outcome(resumed) == outcome(unkilled)
        left.append(resumed["updates"])
    assert left == sorted(left, reverse=True)  # the later it died, the less there was left to do
    assert left[0] == 5
    assert left[-1] == 0


@pytest.mark.parametrize("number", [1, 5])
def test_a_checkpoint_that_was_half_written_is_not_used(
    number: int, attempt: Attempt, unkilled: dict[str, Any], tmp_path: Path
) -> None:
    assert attempt(tmp_path, ("torn", number))["status"] == KILLED
    torn = [path for path in tmp_path.rglob("checkpoint-*") if not (path / "complete").exists()]
    assert len(torn) == 1
    assert outcome(attempt(tmp_path)) == outcome(unkilled)


def test_killed_again_and_again_it_goes_on(attempt: Attempt, tmp_path: Path) -> None:
    """After every single update, of a method whose selections a checkpoint has to keep."""
    mcs = {"method": "mcs", "parameters": {"targets": "q", "score": "grow_drop", "period": 1}}
    whole = attempt(tmp_path / "whole", **mcs)
    assert whole["updates"] == 3
    deaths = 0
    while (report := attempt(tmp_path / "killed", ("step", 2), **mcs))["status"] == KILLED:
        deaths += 1
        assert deaths < 10
    assert deaths == 2  # each attempt got one update further: it died before it could keep a second
    assert outcome(report) == outcome(whole)
