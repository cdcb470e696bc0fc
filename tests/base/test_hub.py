"""A base from the Hub: pinned, verified, whole or not at all; by the real huggingface_hub."""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from gossamer.base.errors import (
    BaseModelError,
    ChecksumMismatchError,
    CorruptBaseError,
    DownloadError,
    HubRefusedError,
    HubUnavailableError,
    NoRoomError,
    PickledWeightsError,
    UnknownBaseError,
    UnpinnedBaseError,
    UnsupportedBaseError,
)
from gossamer.base.fetch import Stage, sha256_of
from gossamer.base.fingerprint import fingerprint
from gossamer.base.hub import named
from gossamer.base.load import BaseFiles, load_model, load_tokenizer
from gossamer.base.sources import open_base
from tests.base.hub_server import HubServer
from tests.tiny import tiny_model

NOWHERE = "http://127.0.0.1:9"
FOLDER = "someone--some-model@0123456789ab"
ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def nobody(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Nobody is logged in, and whoever runs the tests keeps his token."""
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(tmp_path / "no-token"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "no-cache"))


@pytest.fixture
def hub(tiny_dir: Callable[..., Path]) -> Iterator[HubServer]:
    with HubServer.of(tiny_dir("llama")) as server:
        yield server


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return tmp_path / "data"


def opened(hub: HubServer, data: Path, spec: str | None = None, **options: Any) -> BaseFiles:
    return open_base(spec or hub.spec, data, hub_url=hub.url, **options)


def published(data: Path) -> list[str]:
    """The bases that are there, whole or not, without locks and caches."""
    bases = data / "bases"
    names = [path.name for path in bases.iterdir()] if bases.exists() else []
    return [
        name
        for name in names
        if name != ".downloads" and not name.endswith(".lock") and not name.startswith(".f")
    ]


def test_a_pinned_model_is_fetched_and_loads(hub: HubServer, data: Path) -> None:
    hub.files |= {
        "README.md": b"#",
        "modeling_llama.py": b"raise SystemExit('remote code ran')",
        "pytorch_model.bin": b"not even a pickle",
        "consolidated.safetensors": b"the same weights again",
    }
    seen: list[tuple[Stage, int, int]] = []
    base = opened(hub, data, progress=lambda *event: seen.append(event))
    assert (base.name, base.path) == ("some-model", data / "bases" / FOLDER)
    assert base.fingerprint == fingerprint(tiny_model("llama")) == fingerprint(load_model(base))
    assert load_tokenizer(base).chat_template
    assert {path.name for path in base.path.iterdir()} == set(hub.fetched)
    assert set(hub.fetched) >= {"config.json", "tokenizer.json", "model.safetensors"}
    assert not {"README.md", "modeling_llama.py"} & set(hub.fetched)
    assert not {"pytorch_model.bin", "consolidated.safetensors"} & set(hub.fetched)
    done = [(n, total) for stage, n, total in seen if stage == "download"]
    assert done == sorted(done)
    assert done[-1] == (len(hub.files["model.safetensors"]),) * 2
    assert published(data) == [FOLDER]
    assert not (data / "bases" / ".downloads" / FOLDER).exists()
    assert hub.tokens == {None}


def test_it_is_the_base_that_its_folder_is(
    hub: HubServer, data: Path, tiny_dir: Callable[..., Path]
) -> None:
    assert opened(hub, data).fingerprint == open_base(tiny_dir("llama"), data).fingerprint


def test_the_second_start_needs_no_network(hub: HubServer, data: Path) -> None:
    first = opened(hub, data)
    stages: list[Stage] = []
    again = open_base(
        hub.spec, data, hub_url=NOWHERE, progress=lambda stage, *_: stages.append(stage)
    )
    assert (again, stages) == (first, [])
    shouted = f"{hub.repository}@{hub.commit.upper()}"
    assert open_base(shouted, data, hub_url=NOWHERE) == first


def test_a_sharded_model(hub: HubServer, data: Path, tmp_path: Path) -> None:
    tiny_model("llama").save_pretrained(tmp_path / "own", max_shard_size="200KB")
    del hub.files["model.safetensors"]
    hub.files |= {path.name: path.read_bytes() for path in (tmp_path / "own").iterdir()}
    assert opened(hub, data).fingerprint == fingerprint(tiny_model("llama"))
    assert len([name for name in hub.fetched if name.endswith(".safetensors")]) > 1


def test_an_index_cannot_name_files_elsewhere(hub: HubServer, data: Path, tmp_path: Path) -> None:
    del hub.files["model.safetensors"]
    for name in ("../../../outside.safetensors", str(tmp_path / "x.safetensors"), "config.json"):
        hub.files["model.safetensors.index.json"] = json.dumps({"weight_map": {"w": name}}).encode()
        with pytest.raises(UnsupportedBaseError, match="no safetensors of the repository"):
            opened(hub, data)
        shutil.rmtree(data / "bases" / ".downloads")
    assert published(data) == []


@pytest.mark.parametrize("revision", ["", "@main"])
def test_without_a_commit_it_is_refused_and_the_commit_is_told(
    hub: HubServer, data: Path, revision: str
) -> None:
    with pytest.raises(UnpinnedBaseError) as refused:
        opened(hub, data, hub.repository + revision)
    assert refused.value.commit == hub.commit
    assert hub.spec in refused.value.remedy
    assert hub.fetched == []
    assert not data.exists()


@pytest.mark.parametrize("revision", ["", "@main", "@0123456", "@" + "g" * 40, "@" + "0" * 41])
def test_without_a_network_it_is_told_how_to_pin(data: Path, revision: str) -> None:
    with pytest.raises(UnpinnedBaseError) as refused:
        open_base("someone/some-model" + revision, data, hub_url=NOWHERE)
    assert refused.value.commit is None
    assert "someone/some-model@<commit>" in refused.value.remedy
    assert not data.exists()


def test_a_mistyped_path_is_told_so(hub: HubServer, data: Path) -> None:
    with pytest.raises(HubRefusedError, match="no such directory exists"):
        opened(hub, data, "models/some-model")


def test_a_directory_of_that_name_goes_first(
    hub: HubServer,
    data: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    tiny_dir: Callable[..., Path],
) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copytree(tiny_dir("llama"), tmp_path / hub.repository)
    assert opened(hub, data, hub.repository).path == tmp_path / hub.repository
    assert hub.requests == []


@pytest.mark.parametrize(
    "spec", ["some-model", "/a/b", "./a/b", "a/b/c", "a/b.gguf/", "a--b/c", "../a", "a/b@", "a b/c"]
)
def test_what_cannot_be_on_the_hub_is_not_asked_for(spec: str, data: Path) -> None:
    assert named(spec) is None
    with pytest.raises(UnknownBaseError, match="owner/name@<commit>"):
        open_base(spec, data, hub_url=NOWHERE)


def test_pickles_alone_are_refused_before_anything_is_fetched(hub: HubServer, data: Path) -> None:
    hub.files["pytorch_model.bin"] = hub.files.pop("model.safetensors")
    with pytest.raises(PickledWeightsError) as refused:
        opened(hub, data)
    assert refused.value.files == ("pytorch_model.bin",)
    assert hub.repository in refused.value.what
    assert hub.fetched == []


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "tokenizer.json"])
def test_a_repository_without_a_whole_model(hub: HubServer, data: Path, name: str) -> None:
    del hub.files[name]
    with pytest.raises(UnsupportedBaseError, match=f"missing: {name}"):
        opened(hub, data)
    assert hub.fetched == []


def test_an_adapter_is_not_a_base(hub: HubServer, data: Path) -> None:
    hub.files["adapter_config.json"] = b"{}"
    with pytest.raises(UnsupportedBaseError, match="makes it an adapter"):
        opened(hub, data)


def test_quantized_weights_are_refused_before_they_are_fetched(hub: HubServer, data: Path) -> None:
    config = json.loads(hub.files["config.json"])
    hub.files["config.json"] = json.dumps(config | {"quantization_config": {"bits": 4}}).encode()
    with pytest.raises(UnsupportedBaseError, match="quantized"):
        opened(hub, data)
    assert "model.safetensors" not in hub.fetched


def test_bytes_that_are_not_those_listed_are_never_opened(hub: HubServer, data: Path) -> None:
    good = hub.files["model.safetensors"]
    hub.sent["model.safetensors"] = good[:-1] + bytes([good[-1] ^ 1])
    with pytest.raises(ChecksumMismatchError, match=r"model\.safetensors of someone/some-model"):
        opened(hub, data)
    assert published(data) == []
    hub.sent.clear()
    assert opened(hub, data).fingerprint == fingerprint(tiny_model("llama"))
    assert hub.fetched.count("tokenizer.json") == 1, "what was right is not fetched again"


def test_a_file_of_another_size_than_listed(hub: HubServer, data: Path) -> None:
    hub.sent["config.json"] = hub.files["config.json"] + b" "
    with pytest.raises(DownloadError, match=r"config\.json"):
        opened(hub, data)
    assert published(data) == []


def test_a_file_that_was_damaged_since_is_fetched_again(hub: HubServer, data: Path) -> None:
    hub.sent["model.safetensors"] = b"x" * len(hub.files["model.safetensors"])
    with pytest.raises(ChecksumMismatchError):
        opened(hub, data)
    kept = data / "bases" / ".downloads" / FOLDER / "tokenizer.json"
    kept.write_bytes(b"x" * (kept.stat().st_size - 1))
    hub.sent.clear()
    assert load_tokenizer(opened(hub, data))
    assert hub.fetched.count("tokenizer.json") == 2


@pytest.mark.parametrize(
    ("status", "code"),
    [(404, "RepoNotFound"), (401, "RepoNotFound"), (403, "GatedRepo"), (404, "RevisionNotFound")],
)
def test_a_model_that_is_not_there_or_not_for_us(
    hub: HubServer, data: Path, status: int, code: str
) -> None:
    hub.refusal = (status, code)
    with pytest.raises(HubRefusedError, match=f"{status}, {code}") as refused:
        opened(hub, data)
    assert "HF_TOKEN" in refused.value.remedy
    assert published(data) == []


def test_the_token_of_the_environment_is_sent(
    hub: HubServer, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.token = "hf_for_this_test"
    with pytest.raises(HubRefusedError):
        opened(hub, data)
    monkeypatch.setenv("HF_TOKEN", "hf_wrong_one")
    with pytest.raises(HubRefusedError) as refused:
        opened(hub, data)
    assert "hf_wrong_one" not in str(refused.value)
    monkeypatch.setenv("HF_TOKEN", hub.token)
    assert opened(hub, data).name == "some-model"


def test_a_hub_that_fails_or_is_none_or_is_away(hub: HubServer, data: Path) -> None:
    hub.refusal = (500, "Oops")
    with pytest.raises(HubUnavailableError, match="it answered 500"):
        opened(hub, data)
    hub.refusal, hub.page = None, "<!DOCTYPE html><p>Log in to this network"
    with pytest.raises(HubUnavailableError, match="not that of a Hub"):
        opened(hub, data)
    hub.page, hub.listed_as = None, "f" * 40
    with pytest.raises(HubUnavailableError, match="f" * 40):
        opened(hub, data)
    with pytest.raises(HubUnavailableError) as away:
        open_base(hub.spec, data, hub_url="http://name:sEcReT@127.0.0.1:9")
    assert "http://127.0.0.1:9 " in away.value.what
    assert "sEcReT" not in str(away.value)
    assert published(data) == []


@pytest.mark.parametrize("secret", ["name:sEcReT", "name:sEcR@sEcReT"])
def test_an_error_that_quotes_the_endpoint_keeps_its_password(
    data: Path, monkeypatch: pytest.MonkeyPatch, secret: str
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(HubUnavailableError) as offline:
        open_base(
            f"someone/some-model@{'0' * 40}", data, hub_url=f"http://{secret}@hub.example:9/base"
        )
    assert "http://hub.example:9/" in offline.value.why
    assert "sEcR" not in str(offline.value)


def test_a_model_that_does_not_fit_on_the_disk(hub: HubServer, data: Path) -> None:
    hub.sizes["model.safetensors"] = 1 << 60
    with pytest.raises(NoRoomError) as refused:
        opened(hub, data)
    assert refused.value.needed is not None
    assert refused.value.needed > 1 << 60
    assert "model.safetensors" not in hub.fetched


def test_weights_that_cannot_be_loaded_leave_nothing(hub: HubServer, data: Path) -> None:
    hub.files["model.safetensors"] = b"no tensors at all"
    with pytest.raises((CorruptBaseError, UnsupportedBaseError)):
        opened(hub, data)
    assert published(data) == []


OPEN = """
import sys
from pathlib import Path
from gossamer.base.sources import open_base
open_base(sys.argv[1], Path(sys.argv[2]), hub_url=sys.argv[3])
"""


def test_killed_halfway_it_leaves_nothing_half_made(hub: HubServer, data: Path) -> None:
    hub.halfway = "model.safetensors"
    command = [sys.executable, "-c", OPEN, hub.spec, str(data), hub.url]
    with subprocess.Popen(command, cwd=ROOT) as process:
        assert hub.waiting.wait(60), "the download never came to its half"
        process.kill()
    hub.go_on.set()
    assert FOLDER not in published(data)
    hub.halfway = None
    assert opened(hub, data).fingerprint == fingerprint(tiny_model("llama"))
    assert published(data) == [FOLDER]
    assert hub.fetched.count("tokenizer.json") == 1
    assert not (data / "bases" / ".downloads" / FOLDER).exists()


def test_an_interrupt_leaves_nothing_half_made(hub: HubServer, data: Path) -> None:
    def interrupted(stage: Stage, done: int, total: int) -> None:
        if stage == "fingerprint":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        opened(hub, data, progress=interrupted)
    assert published(data) == []
    assert opened(hub, data).name == "some-model"
    assert hub.fetched.count("model.safetensors") == 1
    assert not (data / "bases" / ".downloads" / FOLDER).exists()


def test_it_is_published_where_the_file_system_has_no_hard_links(
    hub: HubServer, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "link", refuse)
    base = opened(hub, data)
    assert base.fingerprint == fingerprint(load_model(base)) == fingerprint(tiny_model("llama"))


def test_what_was_kept_is_read_once_to_be_checked(
    hub: HubServer, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    del hub.files["tokenizer.json"]
    hub.files["tokenizer.model"] = b"kept"  # of these the Hub has the sha256
    hub.sent["model.safetensors"] = b"x" * len(hub.files["model.safetensors"])
    with pytest.raises(ChecksumMismatchError):
        opened(hub, data)
    read: list[str] = []

    def counted(path: Path) -> str:
        read.append(path.name)
        return sha256_of(path)

    monkeypatch.setattr("gossamer.base.hub.sha256_of", counted)
    with pytest.raises(ChecksumMismatchError):
        opened(hub, data)
    assert hub.fetched.count("tokenizer.model") == 1
    assert read == ["tokenizer.model", "model.safetensors"]


def test_an_error_says_what_why_and_what_to_do() -> None:
    errors: list[BaseModelError] = [
        UnpinnedBaseError("a/b", "a/b", None),
        UnpinnedBaseError("a/b", "a/b", "0" * 40),
        HubUnavailableError("x", "y"),
        HubRefusedError("x", "y"),
        NoRoomError(Path("x"), 1, 0),
        NoRoomError(Path("x"), None, 0),
    ]
    for error in errors:
        lines = (error.what, error.why, error.remedy)
        assert all(lines)
        assert "\n" not in str(error)
