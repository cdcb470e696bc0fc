"""kill -9 at any moment, and several processes at once: the whole base or none, and one of it."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from gossamer.base.fingerprint import fingerprint
from tests.base.index_server import IndexServer
from tests.base.tiny_gguf import wheel_of, write_gguf
from tests.tiny import tiny_model

MEMBER = "tiny/tiny.gguf"
ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def index(tmp_path_factory: pytest.TempPathFactory) -> Iterator[IndexServer]:
    gguf = write_gguf(tiny_model("llama"), tmp_path_factory.mktemp("gguf") / "tiny.gguf")
    with IndexServer("tiny", "tiny-1.0-py3-none-any.whl", wheel_of(gguf, MEMBER)) as server:
        yield server


Run = Callable[..., dict[str, Any]]


@pytest.fixture(scope="module")
def run(index: IndexServer) -> Iterator[Run]:
    """`run(root, run="race", ...)`: one job for the harness, which stays up for the module."""
    with subprocess.Popen(
        [sys.executable, "-m", "tests.base.kill_harness"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=ROOT,
    ) as harness:
        stdin, stdout = harness.stdin, harness.stdout
        assert stdin is not None
        assert stdout is not None

        def one(root: Path, **job: Any) -> dict[str, Any]:
            job |= {
                "index_url": index.url,
                "pin": asdict(index.pin),
                "member": MEMBER,
                "root": str(root),
                "fingerprint": fingerprint(tiny_model("llama")),
            }
            index.transfers.clear()
            stdin.write(json.dumps(job) + "\n")
            stdin.flush()
            report: dict[str, Any] = json.loads(stdout.readline())
            return report

        yield one


@pytest.mark.parametrize("stride", [6, pytest.param(1, marks=pytest.mark.gate)])
def test_killed_anywhere_it_leaves_all_or_nothing_and_the_next_one_finishes(
    stride: int, run: Run, tmp_path: Path
) -> None:
    report = run(tmp_path, run="everywhere", stride=stride)
    assert report["kills"] >= 40 / stride
    whole = report["after_retry"][0]
    assert set(whole) >= {"model.safetensors", "config.json", "tokenizer.json"}
    assert all(files == whole for files in report["after_retry"])
    assert all(files in (None, whole) for files in report["after_kill"])
    assert None in report["after_kill"], "some kills came before the result"
    assert whole in report["after_kill"], "and some after it"
    assert report["litter"] == []


def test_killed_in_the_download_the_next_one_continues_it(
    run: Run, index: IndexServer, tmp_path: Path
) -> None:
    report = run(tmp_path, run="download")
    assert report["killed"]
    (part,) = report["part"]
    assert part > len(index.content) / 2
    assert index.transfers == [None, f"bytes={part}-"] or part == len(index.content)
    assert (report["status"], report["litter"]) == (0, [])


def test_of_several_processes_one_makes_the_base(
    run: Run, index: IndexServer, tmp_path: Path
) -> None:
    report = run(tmp_path, run="race", processes=3)
    assert report["statuses"] == [0, 0, 0]
    assert {result["fingerprint"] for result in report["results"]} == {
        fingerprint(tiny_model("llama"))
    }
    made = [result["stages"] for result in report["results"] if "convert" in result["stages"]]
    assert len(made) == 1
    assert len(index.transfers) == 1
    assert all(set(r["stages"]) <= {"wait"} for r in report["results"] if r["stages"] not in made)
