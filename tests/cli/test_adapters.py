"""`gossamer adapters` against a real server."""

from __future__ import annotations

import hashlib
import json
import subprocess
from pathlib import Path

from tests.cli.running import GOSSAMER, Live, assert_three_lines, environment, run, run_json
from tests.cli.stand_ins import StandIn, standing_in
from tests.cli.terminal import Terminal


def test_an_adapter_goes_up_and_comes_down_unchanged(live: Live, tmp_path: Path) -> None:
    file = live.adapter(tmp_path, 1)
    pushed = run_json("adapters", "push", "round", file, env=live.env)
    assert (pushed["name"], pushed["version"], pushed["current"]) == ("round", 1, True)
    target = tmp_path / "back.safetensors"
    pulled = run_json("adapters", "pull", "round", "--out", target, env=live.env)
    assert target.read_bytes() == file.read_bytes()
    assert pulled["digest"] == pushed["digest"]
    assert pulled["sha256"] == hashlib.sha256(file.read_bytes()).hexdigest()
    assert pulled["bytes"] == file.stat().st_size

    again = run("adapters", "pull", "round", "--out", target, env=live.env)
    assert_three_lines(again, "back.safetensors", "--force")
    forced = run("adapters", "pull", "round:1", "--out", target, "--force", env=live.env)
    assert forced.exit_code == 0
    assert [p.name for p in tmp_path.iterdir() if ".part" in p.name] == []


def test_versions_are_listed_rolled_back_and_removed(live: Live, tmp_path: Path) -> None:
    for seed in (2, 3):
        run_json("adapters", "push", "turns", live.adapter(tmp_path, seed), env=live.env)
    kept = run_json(
        "adapters", "push", "turns", live.adapter(tmp_path, 4), "--no-activate", env=live.env
    )
    assert (kept["version"], kept["current"]) == (3, False)

    shown = run("adapters", "show", "turns", "--modules", env=live.env).stdout
    head, *rows = shown.splitlines()
    assert head.startswith("VERSION")
    assert [row.split()[0] for row in rows[:3]] == ["turns:1", "turns:2", "turns:3"]
    assert ["current" in row for row in rows[:3]] == [False, True, False]
    assert "model.layers.0.self_attn.q_proj.weight" in shown

    assert run_json("adapters", "rollback", "turns", env=live.env)["version"] == 1
    assert run_json("adapters", "rollback", "turns", "--to", "3", env=live.env)["version"] == 3
    refused = run("adapters", "rm", "turns:3", env=live.env)
    assert_three_lines(refused, "turns:3", "Roll back")
    assert run_json("adapters", "rm", "turns:1", env=live.env)["deleted"] is True
    found = {a["id"]: a for a in run_json("adapters", "ls", env=live.env)["data"]}
    assert [v["version"] for v in found["turns"]["versions"]] == [2, 3]

    listed = run("adapters", "ls", env=live.env)
    row = next(line for line in listed.stdout.splitlines() if line.startswith("turns "))
    assert row.split()[1:3] == ["3", "2"]
    assert "adapters" in listed.stderr
    assert run("adapters", "rm", "turns", env=live.env).exit_code == 0
    assert_three_lines(run("adapters", "show", "turns", env=live.env), "gossamer adapters ls")


def test_refusals_are_three_lines(live: Live, tmp_path: Path) -> None:
    junk = tmp_path / "junk.safetensors"
    junk.write_bytes(b"junk" * 100)
    assert_three_lines(run("adapters", "push", "junk", junk, env=live.env), "422", "format.md")
    wrong = {**live.env, "GOSSAMER_API_KEY": "sk-000000000000-" + "0" * 64}
    assert_three_lines(run("adapters", "ls", env=wrong), "401", "GOSSAMER_API_KEY")
    for key in ("", "sk-☃", "a\nb"):
        result = run("adapters", "ls", "--url", live.url, "--key", key)
        assert_three_lines(result)
    file = live.adapter(tmp_path, 5)
    assert_three_lines(run("adapters", "push", "No Such", file, env=live.env), "400")
    assert_three_lines(run("adapters", "pull", "nothing", env=live.env), "nothing")
    assert run("adapters", "push", "x", tmp_path / "missing", env=live.env).exit_code == 2


def test_an_address_where_nobody_answers() -> None:
    for url in ("http://127.0.0.1:1", "nonsense", "ftp://127.0.0.1:1"):
        assert_three_lines(run("adapters", "ls", "--url", url), "gossamer up")
    assert_three_lines(run("adapters", "ls", "--url", "http://[::"), "An address is like")


class Lies(StandIn):
    """Something that is no gossamer server, and a download that is not what it says."""

    def reply(self) -> None:
        body = b"bytes" if self.path.endswith("/content") else b"<html>hello</html>"
        self.answer(body, etag='"' + "0" * 64 + '"')


def test_a_damaged_download_leaves_nothing(tmp_path: Path) -> None:
    target = tmp_path / "a.safetensors"
    with standing_in(Lies) as url:
        result = run("adapters", "pull", "a", "--out", target, "--url", url)
        assert_three_lines(result, "damaged", "sha256")
        assert list(tmp_path.iterdir()) == []
        assert_three_lines(run("adapters", "ls", "--url", url), "not answer like a gossamer")


def test_bars_are_drawn_on_a_terminal_only(live: Live, tmp_path: Path) -> None:
    file = live.adapter(tmp_path, 6)
    env = environment(**live.env)
    command = [str(GOSSAMER), "adapters", "push", "bars", str(file)]
    with Terminal(command, env) as terminal:
        assert terminal.finish() == 0
    assert "pushing bars" in terminal.text
    assert "\x1b[" in terminal.text
    assert "bars:1" in terminal.text
    for more in ([], ["--json"]):
        piped = subprocess.run([*command, *more], capture_output=True, text=True, env=env)
        assert piped.returncode == 0
        assert piped.stderr == ""
        assert "\x1b" not in piped.stdout
        assert "bars:1" in piped.stdout
    assert json.loads(piped.stdout)["id"] == "bars:1"
