"""`gossamer keys` on a data folder of its own."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from gossamer.store.catalog.errors import InvalidKey
from gossamer.store.catalog.opening import open_keys, open_registry
from gossamer.store.keys import Principal
from tests.cli.running import assert_three_lines, run, run_json


def verify(data: Path, key: str) -> Principal:
    registry = open_registry(data)
    try:
        return open_keys(data, registry).verify(key)
    finally:
        registry.close()


def test_a_key_works_until_it_is_revoked(tmp_path: Path) -> None:
    made = run_json("keys", "create", "--new-tenant", "--label", "x", "--data-dir", tmp_path)
    assert made["tenant"] == "default"
    assert made["state"] == "active"
    assert verify(tmp_path, made["key"]) == Principal("default", "user", made["id"])

    listed = run("keys", "ls", "--json", "--data-dir", tmp_path)
    assert made["id"] in listed.stdout
    assert made["key"] not in listed.stdout, "the secret is shown once"

    assert run_json("keys", "revoke", made["id"], "--data-dir", tmp_path)["revoked"] is True
    with pytest.raises(InvalidKey):
        verify(tmp_path, made["key"])
    assert [k["state"] for k in run_json("keys", "ls", "--data-dir", tmp_path)] == ["revoked"]


def test_the_text_for_people(tmp_path: Path) -> None:
    empty = run("keys", "ls", "--data-dir", tmp_path)
    assert empty.exit_code == 0
    assert empty.stdout == ""
    options = ("--new-tenant", "--tenant", "acme", "--scope", "admin", "--expires", "90d")
    made = run("keys", "create", *options, "--data-dir", tmp_path)
    key = made.stdout.splitlines()[0]
    assert re.fullmatch("sk-[0-9a-f]{12}-[0-9a-f]{64}", key)
    listed = run("keys", "ls", "--tenant", "acme", "--data-dir", tmp_path).stdout
    head, row = listed.splitlines()
    assert head.split()[:4] == ["ID", "TENANT", "SCOPE", "STATE"]
    assert row.split()[1:4] == ["acme", "admin", "active"]
    # a whole key is taken for its id
    assert run("keys", "revoke", key, "--data-dir", tmp_path).exit_code == 0
    assert "revoked" in run("keys", "ls", "--data-dir", tmp_path).stdout


def test_an_expired_key_is_shown_as_such(tmp_path: Path) -> None:
    registry = open_registry(tmp_path)
    registry.close()
    made = run_json("keys", "create", "--new-tenant", "--expires", "1m", "--data-dir", tmp_path)
    assert 0 < made["expires_at"] - made["created_at"] <= 61


def test_what_cannot_be_done_says_why(tmp_path: Path) -> None:
    where = ("--data-dir", tmp_path)
    assert_three_lines(run("keys", "create", "--tenant", "acme", *where), "acme", "--new-tenant")
    assert_three_lines(run("keys", "create", "--tenant", "A b", "--new-tenant", *where), "A b")
    assert_three_lines(run("keys", "revoke", "000000000000", *where), "gossamer keys ls")
    assert run("keys", "create", "--expires", "soon", *where).exit_code == 2
    secret = tmp_path / "key.secret"
    secret.chmod(0o644)
    assert_three_lines(run("keys", "ls", *where), "chmod 600")


def test_a_file_in_the_place_of_the_data_folder(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("")
    assert_three_lines(run("keys", "ls", "--data-dir", file), "file")
