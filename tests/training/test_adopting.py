"""Attempts at one job: each begins with what the one before has kept, in a folder of its own."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from gossamer.training.checkpoints import FORMAT, abandon, adopt


def kept(folder: Path, *, sealed: tuple[int, ...] = (), torn: tuple[int, ...] = ()) -> None:
    """As an attempt leaves it."""
    (folder / "run.json").write_text(json.dumps({"format": FORMAT}))
    for step in (*sealed, *torn):
        checkpoint = folder / "train" / f"checkpoint-{step}"
        checkpoint.mkdir(parents=True)
        (checkpoint / "values").write_text(str(step))
        if step in sealed:
            (checkpoint / "complete").write_text("")
    (folder / "train").mkdir(exist_ok=True)
    (folder / "train" / "history.json.part").write_text("half")


def files(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def test_what_is_complete_is_taken_over_and_nothing_else(tmp_path: Path) -> None:
    job = tmp_path / "job"
    first = adopt(job, 1)
    kept(first, sealed=(3,), torn=(4,))
    second = adopt(job, 2)
    whole = {"train/checkpoint-3/values", "train/checkpoint-3/complete", "run.json"}
    assert files(second) == whole
    assert {path.name for path in job.iterdir()} == {"attempt-2"}


@pytest.mark.parametrize("run", ["{}", '{"format": 99}'])
def test_what_another_version_of_the_program_has_kept_is_left(run: str, tmp_path: Path) -> None:
    job = tmp_path / "job"
    first = adopt(job, 1)
    kept(first, sealed=(3,))
    (first / "run.json").write_text(run)
    assert files(adopt(job, 2)) == set()
    assert {path.name for path in job.iterdir()} == {"attempt-2"}


def test_whoever_wakes_up_late_writes_where_nobody_reads(tmp_path: Path) -> None:
    job = tmp_path / "job"
    first = adopt(job, 1)
    kept(first, sealed=(3,))
    with (first / "train" / "checkpoint-3" / "values").open("r+") as opened:
        second = adopt(job, 2)
        opened.write("other")
    assert (second / "train" / "checkpoint-3" / "values").read_text() == "3"
    with pytest.raises(FileNotFoundError):
        (first / "train" / "late").write_text("")


@pytest.mark.parametrize("at", ["replace", "copytree", "rmtree"])
def test_killed_while_taking_over(at: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever was done by then, the next attempt has everything."""
    job = tmp_path / "job"
    kept(adopt(job, 1), sealed=(3,))

    class Killed(BaseException):
        pass

    def killed(*_: object, **__: object) -> None:
        raise Killed

    with monkeypatch.context() as patch:
        if at == "replace":
            patch.setattr(Path, "replace", killed)
        else:
            patch.setattr(f"gossamer.training.checkpoints.shutil.{at}", killed)
        with pytest.raises(Killed):
            adopt(job, 2)
    third = adopt(job, 3)
    assert "train/checkpoint-3/complete" in files(third)
    assert {path.name for path in job.iterdir() if not path.name.startswith("taking")} == {
        "attempt-3"
    }


def test_an_attempt_abandons_what_is_its_own(tmp_path: Path) -> None:
    job = tmp_path / "job"
    kept(adopt(job, 1), sealed=(3,))
    second = adopt(job, 2)
    before = files(second)
    abandon(job, 1)  # its folder is the second's now
    assert files(second) == before != set()
    for kind in ("left", "taking"):  # as one that fails while it takes over has them
        (job / f"{kind}-2").mkdir()
    abandon(job, 2)
    assert not list(job.iterdir())
    assert files(adopt(job, 3)) == set()


def test_what_is_abandoned_while_another_takes_it_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between the look and the renaming: it begins with what is there still."""
    job = tmp_path / "job"
    kept(adopt(job, 1), sealed=(3,))
    replace = Path.replace

    def late(self: Path, target: Path) -> Path:
        if self.name == "attempt-1" and target.name == "left-2":
            abandon(job, 1)
        return replace(self, target)

    monkeypatch.setattr(Path, "replace", late)
    assert files(adopt(job, 2)) == set()
    assert {path.name for path in job.iterdir()} == {"attempt-2"}
