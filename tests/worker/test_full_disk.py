"""A worker whose disk is full: a real file system of a few MiB, in a mount namespace of our own."""

from __future__ import annotations

import errno
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from safetensors import SafetensorError

from gossamer.training.attempt import no_room_said
from tests.cli.running import environment
from tests.worker.full_disk import ROOMS

ROOT = Path(__file__).parents[2]


@pytest.mark.gate
def test_a_full_disk_ends_a_job_in_words_and_not_the_queue(
    tmp_path: Path, tiny_dir: Callable[..., Path]
) -> None:
    """Whatever is full first: the registry, the work folder (torch and safetensors tell it in their
    own ways), or the blobs. What can be seen is whole at every moment; the script looks."""
    if shutil.which("unshare") is None:
        pytest.skip("unshare is not installed")
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = f"mount -t tmpfs -o size=24m none {disk}"
    if subprocess.run(["unshare", "-Urm", "sh", "-c", mount], capture_output=True).returncode:
        pytest.skip("this system allows no user namespaces")
    victim = [sys.executable, "-m", "tests.worker.full_disk", str(disk), str(tiny_dir("llama"))]
    run = subprocess.run(
        ["unshare", "-Urm", "sh", "-c", f'{mount} && exec "$@"', "sh", *victim],
        capture_output=True,
        text=True,
        timeout=280,
        env=environment(),
        cwd=ROOT,
    )
    assert run.returncode == 0, run.stderr
    jobs = [json.loads(line) for line in run.stdout.splitlines()]
    assert [job["room"] for job in jobs] == list(ROOMS)
    for job in jobs:
        assert job["work"] == [], "an ended job leaves nothing behind"
        if job["first"] in ("queued", "running"):  # it could not even be told: it is taken again
            assert (job["last"], job["error"]) == ("succeeded", None), job
        elif job["first"] == "failed":
            assert (job["last"], job["error"]) == ("failed", "disk_full"), job
            assert "no room left" in job["message"]
        else:
            assert job["first"] == job["last"] == "succeeded", job
    # With no room nothing can be written, with enough everything; in between a job can be ended.
    endings = [job["first"] for job in jobs]
    assert endings[0] == "queued"
    assert endings[-1] == "succeeded"
    assert endings.count("failed") >= 3
    assert "SafetensorError" in run.stderr, "what was to be translated has not happened"


class Usage(NamedTuple):
    free: int


UNWRITTEN = [
    RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 576 vs 534"),
    RuntimeError("PytorchStreamWriter failed writing file data/0: file write failed"),
    SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"),
    shutil.Error([("a", "b", "[Errno 28] No space left on device")]),
]
OTHERS = [
    torch.OutOfMemoryError("CUDA out of memory, in inline_container"),
    RuntimeError("mat1 and mat2 shapes cannot be multiplied (4x3 and 4x3)"),
    SafetensorError("Error while deserializing header: HeaderTooLarge"),
    FileNotFoundError(errno.ENOENT, "No such file or directory"),
    ValueError("a bug"),
]


@pytest.mark.parametrize("error", [*UNWRITTEN, *OTHERS], ids=str)
@pytest.mark.parametrize("free", [0, 1 << 30])
def test_only_what_could_not_be_written_is_a_full_disk(
    error: Exception, free: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gossamer.training.attempt.shutil.disk_usage", lambda _: Usage(free))
    with (
        pytest.raises(type(error) if free or error in OTHERS else OSError) as caught,
        no_room_said(tmp_path / "not" / "there"),
    ):
        raise error
    if free or error in OTHERS:
        assert caught.value is error
    else:
        assert isinstance(caught.value, OSError)
        assert caught.value.errno == errno.ENOSPC
        assert caught.value.__cause__ is error
