"""`gossamer adapters pull --increment` against a real server."""

from __future__ import annotations

from pathlib import Path

import pytest

from gossamer.store.format import digest, read, write
from tests.api.test_increments import joined, three
from tests.cli.running import Live, assert_three_lines, run, run_json


def test_a_link_of_a_chain_comes_down_without_its_parents(
    live: Live, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    info = live.info()
    chain = three(dict(info.table), 41, info.fingerprint)
    for name, adapter in zip(("one", "two", "three"), chain, strict=True):
        write(adapter, tmp_path / name)
        run_json("adapters", "push", f"link-{name}", tmp_path / name, env=live.env)
    pulled = run_json("adapters", "pull", "link-three:1", "--increment", env=live.env)
    assert pulled["file"] == "link-three.increment.safetensors"
    made = read(tmp_path / pulled["file"])
    assert pulled["digest"] == digest(made) != digest(chain[2])
    assert digest(joined([chain[1], made], chain[2])) == digest(chain[2])
    whole = run_json("adapters", "pull", "link-three", env=live.env)
    assert (whole["file"], whole["digest"]) == ("link-three.safetensors", digest(chain[2]))

    refused = run("adapters", "pull", "link-one", "--increment", env=live.env)
    assert_three_lines(refused, "409", "names no parents", "Pull the whole version")
    assert not list(tmp_path.glob("link-one*"))
