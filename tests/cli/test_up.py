"""`gossamer up`: a real process."""

from __future__ import annotations

import json
import signal
import socket
import subprocess
from collections.abc import Callable
from importlib import import_module
from pathlib import Path

import httpx
import pytest

from gossamer.api.settings import Settings
from gossamer.cli.output import Output
from gossamer.cli.supervising import Supervised
from tests.cli.running import Live, assert_three_lines, environment, run, run_json, up


def test_it_listens_and_its_key_works(live: Live) -> None:
    assert httpx.get(f"{live.url}/health/ready").status_code == 200
    headers = {"authorization": f"Bearer {live.key}"}
    models = httpx.get(f"{live.url}/v1/models", headers=headers).json()
    assert models["data"][0]["id"] == "base"
    assert httpx.get(f"{live.url}/v1/models").status_code == 401


def test_people_read_the_address_and_once_the_key(
    tiny_dir: Callable[..., Path], tmp_path: Path
) -> None:
    data = tmp_path / "data"
    process = subprocess.Popen(
        [*up(tiny_dir("llama"), data), "--host", "0.0.0.0"],  # noqa: S104
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment(GOSSAMER_LOG_LEVEL="warning", GOSSAMER_MEMORY_BYTES=str(64 << 20)),
    )
    with process:
        assert process.stdout is not None
        first, second, _, _, exported = (process.stdout.readline() for _ in range(5))
        process.send_signal(signal.SIGINT)
        _, stderr = process.communicate(timeout=60)
    assert first.startswith("Listening on http://0.0.0.0:")
    port = first.split()[-1].rpartition(":")[2]
    assert f"GOSSAMER_URL=http://127.0.0.1:{port} " in exported, "where it is reached from here"
    assert "shown this once: sk-" in second
    assert process.returncode == 0
    assert "\x1b" not in stderr, "no bars without a terminal"
    for line in stderr.splitlines()[1:]:
        json.loads(line)
    key = second.split()[-1]
    assert [k["id"] for k in run_json("keys", "ls", "--data-dir", data)] == [key.split("-")[1]]


def test_its_options_become_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Settings] = []

    def serve(settings: Settings, output: Output, worker: Supervised | None) -> int:
        asked.append(settings)
        return 0

    monkeypatch.setattr(import_module("gossamer.cli.up"), "_serve", serve)
    assert run("up", "--fuse-share", "0.8", "--fuse-16bit", "--threads", "3").exit_code == 0
    assert run("up", env={"GOSSAMER_FUSE_16BIT": "1"}).exit_code == 0
    assert run("up").exit_code == 0
    assert [(s.fuse_share, s.fuse_16bit, s.threads) for s in asked] == [
        (0.8, True, 3),
        (1.0, True, None),
        (1.0, False, None),
    ]
    assert [s.attention for s in asked] == ["triton"] * 3
    assert run("up", "--attention", "flashinfer").exit_code == 0
    assert asked[-1].attention == "flashinfer"
    assert run("up", "--attention", "ours").exit_code == 2
    for wrong in ("0", "1.5", "nan"):
        assert run("up", "--fuse-share", wrong).exit_code == 2
    assert run("up", "--worker-threads", "1").exit_code == 2, "threads of no worker"


def test_a_later_start_shows_no_key_and_keys_made_beside_it_work(live: Live) -> None:
    assert live.said["key"] is None
    made = run_json("keys", "create", "--data-dir", live.data_dir)["key"]
    listed = ("adapters", "ls", "--url", live.url, "--key")
    assert run(*listed, made).exit_code == 0
    run_json("keys", "revoke", made, "--data-dir", live.data_dir)
    assert run(*listed, made).exit_code == 1


@pytest.mark.usefixtures("logging_restored")
def test_a_data_folder_that_another_server_has(live: Live, tiny_dir: Callable[..., Path]) -> None:
    result = run(*up(tiny_dir("llama"), live.data_dir)[1:])
    assert result.exit_code == 1
    assert result.stdout == ""
    assert "The data folder is in use." in result.stderr


@pytest.mark.usefixtures("logging_restored")
def test_flashinfer_without_a_gpu(tiny_dir: Callable[..., Path], tmp_path: Path) -> None:
    result = run(
        *up(tiny_dir("llama"), tmp_path)[1:], "--attention", "flashinfer", "--device", "cpu"
    )
    assert result.exit_code == 1
    assert "FlashInfer needs a GPU" in result.stderr
    assert "--attention" in result.stderr


@pytest.mark.usefixtures("logging_restored")
def test_a_base_that_is_not_there(tmp_path: Path) -> None:
    result = run(*up(Path("no-such-model"), tmp_path)[1:])
    assert result.exit_code == 1
    assert "no-such-model" in result.stderr


def test_an_address_that_is_taken(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        result = run("up", "--port", port, "--data-dir", tmp_path)
    assert result.exit_code == 1
    assert f"127.0.0.1:{port}" in result.stderr
    assert "--port 0" in result.stderr


@pytest.mark.usefixtures("logging_restored")
def test_a_blob_store_that_is_another_servers(
    tiny_dir: Callable[..., Path], tmp_path: Path
) -> None:
    (tmp_path / "blobs").mkdir()
    (tmp_path / "blobs" / "owner").write_text("f" * 32)
    arguments = up(tiny_dir("llama"), tmp_path / "data")[1:]
    result = run(*arguments, env={"GOSSAMER_BLOBS_URL": (tmp_path / "blobs").as_uri()})
    assert (result.exit_code, result.stdout) == (1, "")
    what, why, remedy = result.stderr.splitlines()[-3:]
    assert what == "Error: The blob store is not the one of this registry."
    assert "f" * 32 in why
    assert "GOSSAMER_BLOBS_URL" in remedy


def test_a_blob_store_that_cannot_be_used_is_told_before_the_base_is_fetched(
    tmp_path: Path,
) -> None:
    arguments = ("up", "--data-dir", tmp_path / "data", "--port", "0")
    secret = run(*arguments, env={"GOSSAMER_BLOBS_URL": "s3://key:sEcReT@bucket"})
    assert_three_lines(secret, "credentials", "GOSSAMER_BLOBS_URL", code=2)
    assert "sEcReT" not in secret.output
    gone = run(
        *arguments,
        "--json",
        env={
            "GOSSAMER_BLOBS_URL": "s3://bucket",
            "AWS_ACCESS_KEY_ID": "key",
            "AWS_SECRET_ACCESS_KEY": "sEcReT",
            "AWS_ENDPOINT_URL": "http://127.0.0.1:9",
            "AWS_ALLOW_HTTP": "true",
        },
    )
    assert_three_lines(gone, "blob store", "error sending request", "GOSSAMER_BLOBS_URL")
    assert "sEcReT" not in gone.output
    assert not (tmp_path / "data").exists()
