"""`gossamer doctor`: what it finds, and that it changes nothing."""

from __future__ import annotations

import socket
import sqlite3
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests import s3
from tests.cli.running import Live, run, run_json


def findings(*arguments: str | Path) -> dict[str, dict[str, Any]]:
    import json

    result = run("doctor", "--json", *arguments)
    document = json.loads(result.stdout)
    failed = any(finding["state"] == "fail" for finding in document["checks"])
    assert document["ok"] is not failed
    assert result.exit_code == (1 if failed else 0)
    for finding in document["checks"]:
        assert bool(finding["remedy"]) == (finding["state"] != "ok"), finding
    return {finding["check"]: finding for finding in document["checks"]}


def test_a_fresh_machine(tmp_path: Path) -> None:
    data = tmp_path / "data"
    found = findings("--data-dir", data, "--port", "0")
    assert found["python"]["state"] == found["packages"]["state"] == "ok"
    assert "torch" in found["packages"]["found"]
    assert "cpu" in found["backends"]["found"]
    assert "threads on" in found["threads"]["found"]
    assert found["base"]["state"] == "warn"
    assert "gossamer up" in found["base"]["remedy"]
    assert not data.exists(), "it only looks"


def test_a_server_that_runs(live: Live, tiny_dir: Callable[..., Path]) -> None:
    port = live.url.rpartition(":")[2]
    base = tiny_dir("llama")
    found = findings("--data-dir", live.data_dir, "--base", base, "--port", port)
    assert live.base.fingerprint in found["base"]["found"]
    assert found["registry"]["state"] == "ok"
    assert found["key secret"]["state"] == "ok"
    assert "a gossamer server answers" in found["address"]["found"]
    text = run("doctor", "--data-dir", live.data_dir, "--base", base, "--port", port).stdout
    assert text.splitlines()[0].startswith("ok    python")


def test_what_is_broken_is_found(tmp_path: Path) -> None:
    data = tmp_path / "data"
    run_json("keys", "create", "--new-tenant", "--data-dir", data)
    secret, registry = data / "key.secret", data / "registry.sqlite3"
    before = findings("--data-dir", data, "--port", "0")
    assert before["registry"]["state"] == before["key secret"]["state"] == "ok"

    secret.chmod(0o644)
    _set_revision(registry, "9999")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        taken.listen()
        port = str(taken.getsockname()[1])
        found = findings("--data-dir", data, "--port", port, "--base", tmp_path / "nothing")
    assert found["key secret"]["state"] == "fail"
    assert "chmod 600" in found["key secret"]["remedy"]
    assert found["registry"]["state"] == "fail"
    assert "later release" in found["registry"]["found"]
    assert found["address"]["state"] == "fail"
    assert found["base"]["state"] == "fail"

    _set_revision(registry, "0001")
    assert findings("--data-dir", data, "--port", "0")["registry"]["state"] == "warn"
    registry.write_bytes(b"no database at all " * 100)
    assert findings("--data-dir", data, "--port", "0")["registry"]["state"] == "fail"


def _set_revision(registry: Path, revision: str) -> None:
    connection = sqlite3.connect(registry)
    with connection:
        connection.execute("update alembic_version set version_num = ?", (revision,))
    connection.close()


def test_a_data_folder_that_cannot_be(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("")
    found = findings("--data-dir", file / "data", "--port", "0")
    assert found["data folder"]["state"] == "fail"
    assert "disk" not in found


def test_too_many_threads_and_too_little_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GOSSAMER_THREADS", "999")
    monkeypatch.setenv("GOSSAMER_MEMORY_BYTES", str(1 << 50))
    found = findings("--data-dir", tmp_path, "--port", "0")
    assert found["threads"]["state"] == found["memory"]["state"] == "warn"


def test_a_blob_store_in_a_bucket(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = tmp_path / "data"
    assert "blob store" not in findings("--data-dir", data, "--port", "0")
    monkeypatch.setenv("GOSSAMER_BLOBS_URL", "s3://blobs/gossamer")
    with s3.serving() as server:
        for name, value in server.environment().items():
            monkeypatch.setenv(name, value)
        found = findings("--data-dir", data, "--port", "0")["blob store"]
        assert (found["state"], "NoSuchBucket" in found["found"]) == ("fail", True)
        server.make_bucket("blobs")
        found = findings("--data-dir", data, "--port", "0")["blob store"]
        assert (found["state"], found["found"]) == ("ok", "s3://blobs/gossamer")
    assert not data.exists(), "it only looks"


def test_a_model_of_the_hub_that_is_not_there_yet(tmp_path: Path) -> None:
    spec = "someone/some-model@" + "0123456789" * 4
    found = findings("--data-dir", tmp_path, "--port", "0", "--base", spec)["base"]
    assert found["state"] == "warn"
    assert "someone/some-model" in found["found"]
    assert "Hub" in found["remedy"]
