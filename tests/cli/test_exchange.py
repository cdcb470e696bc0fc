"""`gossamer adapters import | export | formats`, and folders that are pushed as they are."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from typer.testing import Result

from gossamer.cli.errors import CommandError
from gossamer.store.format import digest, read
from tests.api.foreign import Foreign, shira, sparta
from tests.cli.running import Live, assert_three_lines, run, run_json
from tests.cli.stand_ins import StandIn, standing_in
from tests.exchange.support import USES_PEFT, assert_same_logits, load

pytestmark = USES_PEFT
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


@pytest.fixture(scope="module")
def base(tiny_dir: Callable[..., Path]) -> Path:
    """The base that the live server has too."""
    return tiny_dir("llama")


@pytest.fixture(scope="module")
def theirs(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Foreign:
    return shira(base, tmp_path_factory.mktemp("shira"))


@pytest.fixture
def here(base: Path, tmp_path: Path) -> list[str | Path]:
    """The options that name the base."""
    return ["--base", base, "--data-dir", tmp_path / "data"]


def left_over(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if ".part" in path.name]


def test_what_is_imported_is_the_adapter(
    theirs: Foreign, base: Path, here: list[str | Path], tmp_path: Path
) -> None:
    out = tmp_path / "a.safetensors"
    said = run_json("adapters", "import", theirs.folder, "--out", out, *here)
    made = read(out)
    assert (said["format"], said["file"], said["version"]) == ("peft-shira", str(out), None)
    assert (said["digest"], said["nnz"]) == (digest(made), made.nnz)
    assert (said["bytes"], said["weights"]) == (out.stat().st_size, len(made.deltas))
    assert said["facts"]["padding_dropped"] == 0
    assert said["base_fingerprint"] == made.base_fingerprint == ""
    (warning,) = said["warnings"]
    assert "which base" in warning
    model = PeftModel.from_pretrained(load(base), theirs.folder).eval()
    assert_same_logits(model, base, made.deltas)
    assert left_over(tmp_path) == []


def test_people_are_told_the_facts(theirs: Foreign, here: list[str | Path], tmp_path: Path) -> None:
    command = ("adapters", "import", theirs.folder, "--out", tmp_path / "a.safetensors", *here)
    result = run(*command)
    assert result.exit_code == 0, result.output
    first, *facts = result.stdout.splitlines()
    assert "a.safetensors" in first
    assert "sha256:" in first
    assert "  padding dropped: 0" in facts
    assert "Warning: " in result.stderr
    assert_three_lines(run(*command), "a.safetensors is there already", "--force")
    rounded = run_json(*command, "--force", "--values", "BF16")
    made = read(tmp_path / "a.safetensors")
    assert {delta.value_dtype for delta in made.deltas.values()} == {"BF16"}
    assert rounded["digest"] == digest(made)


def test_an_import_that_fails_leaves_what_was_there(
    theirs: Foreign, here: list[str | Path], tmp_path: Path
) -> None:
    out, bad = tmp_path / "a.safetensors", tmp_path / "bad"
    out.write_bytes(b"old")
    bad.mkdir()
    for name, data in theirs.files(CONFIG, WEIGHTS).items():
        (bad / name).write_bytes(data[:-4])
    result = run("adapters", "import", bad, "--out", out, "--force", *here)
    assert_three_lines(result, "cannot be imported")
    assert out.read_bytes() == b"old"
    assert left_over(tmp_path) == []


def test_refusals_say_what_to_do(
    theirs: Foreign, here: list[str | Path], tmp_path: Path, tiny_dir: Callable[..., Path]
) -> None:
    def result(*arguments: str | Path) -> Result:
        out = tmp_path / "a.safetensors"
        return run("adapters", "import", *arguments, "--out", out, *here)

    half = result(theirs.folder / WEIGHTS)
    assert_three_lines(half, "none of the formats", "Give the folder", "gossamer adapters formats")
    assert_three_lines(result(theirs.folder, "--from", "peft-sparta"), "is missing")
    for wrong in (["--from", "nonsense"], ["--density", "0.1"], ["--density", "0"]):
        refused = result(theirs.folder, *wrong)
        assert (refused.exit_code, refused.stdout) == (2, "")
        assert wrong[0] in refused.stderr
    assert result(tmp_path / "missing").exit_code == 2
    assert run("adapters", "import", theirs.folder, *here).exit_code == 2  # to where?
    nowhere = tmp_path / "no" / "a.safetensors"
    assert_three_lines(
        run("adapters", "import", theirs.folder, "--out", nowhere, *here), "no folder"
    )
    other: list[str | Path] = ["--base", tiny_dir("phi3"), "--data-dir", tmp_path / "data"]
    strange = run("adapters", "import", theirs.folder, "--out", tmp_path / "b", *other)
    assert_three_lines(strange, "unknown here", "--base")
    assert not (tmp_path / "a.safetensors").exists()


def test_an_import_can_be_pushed_at_once(
    live: Live, theirs: Foreign, base: Path, tmp_path: Path
) -> None:
    here = ("--base", base, "--data-dir", tmp_path)
    command = ("adapters", "import", theirs.folder, "--push", "imported", *here)
    said = run_json(*command, env=live.env)
    assert (said["file"], said["version"]["id"]) == (None, "imported:1")
    assert said["version"]["digest"] == said["digest"]
    assert said["version"]["record"]["imported"]["format"] == "peft-shira"
    assert len(said["warnings"]) == len(set(said["warnings"])) == 1
    result = run(*command, env=live.env)
    assert result.stdout.startswith(f"imported ({live.url})")
    assert_three_lines(run(*command, "--url", "http://127.0.0.1:1"), "gossamer up")


def test_a_push_that_will_be_refused_is_told_before_the_conversion(
    live: Live,
    theirs: Foreign,
    base: Path,
    tmp_path: Path,
    tiny_dir: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def never(*_: object, **__: object) -> None:
        raise AssertionError("it was converted")

    monkeypatch.setattr("gossamer.store.exchange.packing.pack", never)
    out, there = tmp_path / "out", ("--data-dir", tmp_path / "data")

    def pushed(name: str, *options: str | Path, model: Path = base) -> Result:
        import_ = ("adapters", "import", theirs.folder, "--push", name, "--out", out)
        return run(*import_, "--base", model, *there, *options, env=live.env)

    assert_three_lines(pushed("x", "--url", "http://127.0.0.1:1"), "gossamer up")
    assert_three_lines(pushed("x", "--key", "sk-wrong"), "401", "GOSSAMER_API_KEY")
    assert_three_lines(pushed("Not A Name"), "The name cannot be used")
    assert_three_lines(pushed("base"), "The name cannot be used")
    other = tiny_dir("llama", seed=5)
    assert_three_lines(pushed("x", model=other), "runs another base", "--base")
    assert not out.exists()


def test_a_push_that_fails_tells_of_the_file(
    live: Live, theirs: Foreign, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise CommandError("The server refused it (507).", "No space.", "Make room.")

    out = tmp_path / "a.safetensors"
    command: list[str | Path] = ["adapters", "import", theirs.folder, "--push", "late"]
    command += ["--base", base, "--data-dir", tmp_path / "data"]
    monkeypatch.setattr("gossamer.cli.adapters.push_file", refuse)
    assert_three_lines(run(*command, env=live.env), "No space.", "Make room.")
    result = run(*command, "--out", out, env=live.env)
    assert_three_lines(result, "507", "No space. Make room.", f"{out} is there")
    assert f"gossamer adapters push late {out}" in result.stderr
    assert read(out).deltas


@pytest.mark.parametrize("form", ["peft-shira", "peft-sparta"])
def test_a_folder_is_pushed_as_it_is(
    live: Live, theirs: Foreign, base: Path, tmp_path: Path, form: str
) -> None:
    folder = theirs.folder if form == "peft-shira" else sparta(base, tmp_path / "made").folder
    version = run_json("adapters", "push", f"folder-{form}", folder, env=live.env)
    assert version["record"]["imported"]["format"] == form
    assert not any("Not read" in warning for warning in version["warnings"])
    kept = run_json("adapters", "push", form, folder, "--no-activate", env=live.env)
    assert kept["current"] is False
    for name in (form, f"folder-{form}"):
        run_json("adapters", "rm", name, env=live.env)


def test_a_file_that_is_a_whole_adapter_is_pushed_as_it_is(
    live: Live, base: Path, tmp_path: Path
) -> None:
    file = sparta(base, tmp_path / "made").folder / "sparse_deltas.safetensors"
    version = run_json("adapters", "push", "one-file", file, env=live.env)
    assert version["record"]["imported"]["format"] == "peft-sparta"
    packed = tmp_path / file.name
    packed.write_bytes(live.make_file(70))
    version = run_json("adapters", "push", "one-file", packed, env=live.env)
    assert version["record"] == {"seed": 70}
    run_json("adapters", "rm", "one-file", env=live.env)


@pytest.mark.parametrize("beside", ["head_init.pt", "new_embeddings_init.safetensors"])
def test_a_folder_that_would_lose_a_part_is_not_pushed(
    live: Live, base: Path, here: list[str | Path], tmp_path: Path, beside: str
) -> None:
    """What `import` refuses is not left out."""
    folder = sparta(base, tmp_path / "made").folder
    (folder / beside).write_bytes(b"x")
    assert_three_lines(run("adapters", "push", "half", folder, env=live.env), beside)
    assert_three_lines(run("adapters", "show", "half", env=live.env), "half")  # there is none
    out = tmp_path / "a.safetensors"
    assert_three_lines(run("adapters", "import", folder, "--out", out, *here), beside)


def test_a_conversion_may_take_longer_than_a_server_is_silent(
    theirs: Foreign, live: Live, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    figures = {"bytes": 1, "nnz": 1, "density": 0.1, "digest": "sha256:0", "warnings": []}

    class Slow(StandIn):
        def reply(self) -> None:
            time.sleep(1)
            self.answer(json.dumps({"id": "x:1", **figures}).encode(), 201)

    monkeypatch.setattr("gossamer.cli.remote._SILENCE", 0.3)
    with standing_in(Slow) as url:
        pushed = ("adapters", "push", "x")
        assert run_json(*pushed, theirs.folder, "--url", url)["id"] == "x:1"
        file = live.adapter(tmp_path, 71)
        assert_three_lines(run(*pushed, file, "--url", url), "did not answer")


def test_folders_that_cannot_be_pushed(live: Live, theirs: Foreign, tmp_path: Path) -> None:
    push = ("adapters", "push", "x")
    assert_three_lines(run(*push, tmp_path, env=live.env), "nothing", "adapters formats")
    (tmp_path / "notes.txt").write_text("x")
    assert_three_lines(run(*push, tmp_path, env=live.env), "notes.txt")
    (tmp_path / CONFIG).write_bytes(theirs.files(CONFIG)[CONFIG])
    assert_three_lines(run(*push, tmp_path, env=live.env), f"no {WEIGHTS}")
    (tmp_path / WEIGHTS).write_bytes(b"x" * 100)
    assert_three_lines(run(*push, tmp_path, env=live.env), "422")
    (tmp_path / CONFIG).write_text(json.dumps({"peft_type": "SUPERTUNING"}))
    refused = run(*push, tmp_path, env=live.env)
    assert_three_lines(refused, "peft-supertuning", "gossamer adapters import")


@pytest.mark.parametrize("form", ["peft-shira", "peft-sparta"])
def test_what_is_exported_comes_back(
    live: Live, here: list[str | Path], tmp_path: Path, form: str
) -> None:
    file = live.adapter(tmp_path, 61)
    out = tmp_path / "out"
    said = run_json("adapters", "export", file, "--to", form, "--out", out, *here)
    assert sorted(said["files"]) == sorted(path.name for path in out.iterdir())
    assert said["bytes"] == sum(path.stat().st_size for path in out.iterdir())
    back = tmp_path / "back.safetensors"
    again = run_json("adapters", "import", out, "--out", back, *here)
    assert again["format"] == form
    assert _entries(back) == _entries(file)
    refused = run("adapters", "export", file, "--to", form, "--out", out, *here)
    assert_three_lines(refused, "not empty")
    assert left_over(tmp_path) == []


def _entries(file: Path) -> dict[str, tuple[list[int], list[float]]]:
    deltas = read(file).deltas
    return {
        name: (delta.elements()[0].tolist(), delta.elements()[1].tolist())
        for name, delta in deltas.items()
    }


def test_an_adapter_of_a_server_is_exported(
    live: Live,
    base: Path,
    here: list[str | Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    file = live.adapter(tmp_path, 62)
    run_json("adapters", "push", "outward", file, env=live.env)
    out = tmp_path / "out"
    out.mkdir()  # an empty one will do
    command = ("adapters", "export", "outward:1", "--to", "peft-shira", "--out", out)
    result = run(*command, *here, env=live.env)
    assert result.exit_code == 0, result.output
    model = PeftModel.from_pretrained(load(base), out).eval()
    assert_same_logits(model, base, read(file).deltas)
    monkeypatch.chdir(tmp_path)
    Path("outward").mkdir()  # a folder that is called as the adapter is
    again = ("adapters", "export", "outward", "--to", "peft-shira", "--out", tmp_path / "again")
    assert run(*again, *here, env=live.env).exit_code == 0
    missing = run(*command[:2], "nobody", *command[3:-1], tmp_path / "new", *here, env=live.env)
    assert_three_lines(missing, "nobody")
    assert not (tmp_path / "new").exists()


def test_a_merged_model_is_the_base_with_the_adapter(
    live: Live, base: Path, here: list[str | Path], tmp_path: Path
) -> None:
    """It loads in transformers, and comes back as a checkpoint, whole or the most of it."""
    file, out = live.adapter(tmp_path, 66), tmp_path / "merged"
    command = ("adapters", "export", file, "--to", "merged", "--out", out, "--shard-size", "100KiB")
    said = run_json(*command, *here)
    assert sum(name.startswith("model-") for name in said["files"]) > 1
    assert said["facts"]["absorbed"] < 0.01
    ours = read(file)
    assert_same_logits(load(out), base, ours.deltas)

    back = tmp_path / "back.safetensors"
    whole = run_json("adapters", "import", out, "--out", back, *here)
    assert (whole["format"], whole["base_fingerprint"]) == ("checkpoint", live.base.fingerprint)
    assert not any("which base" in warning for warning in whole["warnings"])
    assert whole["nnz"] == pytest.approx(ours.nnz, rel=0.01)
    import_ = ("adapters", "import", out, "--out", back, "--force", "--density", "0.01", *here)
    most = run_json(*import_)
    elements = sum(rows * columns for rows, columns in live.info().table.values())
    assert most["nnz"] == read(back).nnz == round(0.01 * elements)
    assert 0.5 < most["facts"]["norm_kept"] < 1
    assert "norm kept: 0." in run(*import_).stdout


def test_a_patch_goes_out_and_comes_back(
    live: Live, here: list[str | Path], tmp_path: Path
) -> None:
    file, out, back = live.adapter(tmp_path, 67), tmp_path / "patch", tmp_path / "back"
    run_json("adapters", "export", file, "--to", "weight-patch", "--out", out, *here)
    assert run_json("adapters", "import", out, "--out", back, *here)["format"] == "weight-patch"
    ours, theirs = read(file).deltas, read(back).deltas
    for name, delta in ours.items():
        # what is replaced is W + Δ, rounded to the base's float32
        assert abs(delta.dense() - theirs[name].dense()).max() < 1e-6


def test_a_pickle_is_read_and_not_run(base: Path, here: list[str | Path], tmp_path: Path) -> None:
    made = sparta(base, tmp_path / "made").folder
    tensors = load_file(made / "sparse_deltas.safetensors")
    pickled: dict[str, dict[str, torch.Tensor]] = {"indices": {}, "deltas": {}}
    for key, value in tensors.items():
        kind, _, name = key.partition(".")
        pickled[kind][name] = value.clone()
    file = tmp_path / "sparse_deltas.pt"
    torch.save(pickled, file)
    outs = [tmp_path / name for name in ("pickled", "plain")]
    for source, out in zip((file, made), outs, strict=True):
        run_json("adapters", "import", source, "--out", out, *here)
    assert _entries(outs[0]) == _entries(outs[1])

    canary = tmp_path / "canary"
    torch.save({"indices": _Command(canary), "deltas": {}}, file)
    refused = run("adapters", "import", file, "--out", tmp_path / "no", *here)
    assert_three_lines(refused, "cannot be imported")
    assert not canary.exists()
    torch.load(file, weights_only=False)
    assert canary.exists(), "the pickle is not as hostile as it should be"


class _Command:
    """An object whose pickle makes a file when it is loaded without care."""

    def __init__(self, canary: Path) -> None:
        self._canary = canary

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self._canary),)


def test_packed_files_are_written_anew(live: Live, tmp_path: Path) -> None:
    """Without the base, and without torch."""
    file = live.adapter(tmp_path, 63)
    run_json("adapters", "push", "repacked", file, env=live.env)
    sizes = {}
    for coding in ("raw", "zstd"):
        out = tmp_path / coding
        command = ("adapters", "export", "repacked", "--to", "packed", "--out", out)
        said = run_json(*command, "--coding", coding, env=live.env)
        assert said["digest"] == digest(read(file)) == digest(read(out))
        sizes[coding] = said["bytes"]
        assert_three_lines(run(*command, env=live.env), "there already", "--force")
        assert run(*command, "--force", env=live.env).exit_code == 0
    assert sizes["zstd"] < sizes["raw"]
    assert_three_lines(run(*command[:-1], tmp_path, "--force", env=live.env), "It is no file")


def test_exports_that_cannot_be(
    live: Live, here: list[str | Path], tmp_path: Path, tiny_dir: Callable[..., Path]
) -> None:
    file, out = live.adapter(tmp_path, 64), tmp_path / "out"

    def result(*arguments: str | Path, base: list[str | Path] = here) -> Result:
        return run("adapters", "export", *arguments, "--out", out, *base)

    assert "peft-shira" in result(file, "--to", "nonsense").stderr
    for more in (["--coding", "raw"], ["--force"], ["--shard-size", "1GiB"]):
        refused = result(file, "--to", "peft-shira", *more)
        assert (refused.exit_code, more[0] in refused.stderr) == (2, True)
    assert result(file, "--to", "merged", "--shard-size", "huge").exit_code == 2
    packed = ["--values", "F16"], ["--shard-size", "1GiB"], here[:2], here[2:]
    for option, value in packed:
        refused = result(file, "--to", "packed", option, value, base=[])
        assert (refused.exit_code, str(option) in refused.stderr) == (2, True)
    assert_three_lines(result("./gone.safetensors", "--to", "peft-shira"), "no such file")
    junk = tmp_path / "junk.safetensors"
    junk.write_bytes(b"junk" * 100)
    assert_three_lines(result(junk, "--to", "peft-shira"), "cannot be exported", "exchange.md")
    other: list[str | Path] = ["--base", tiny_dir("llama", seed=5), "--data-dir", tmp_path]
    assert_three_lines(result(file, "--to", "peft-shira", base=other), "made for", "--base")
    dense = live.adapter(tmp_path, 65, density=0.9)
    assert_three_lines(result(dense, "--to", "peft-shira"), "SHiRA cannot say")
    assert not out.exists()
    assert left_over(tmp_path) == []


def test_formats_are_listed() -> None:
    rows = {row["name"]: row for row in run_json("adapters", "formats")["data"]}
    assert rows["peft-shira"]["files"] == [CONFIG, WEIGHTS]
    for row in rows.values():
        assert row["import"] or row["export"]
        assert row["link"].startswith("https://")
        # What is not named is not sent.
        assert bool(row["files"]) >= row["upload"]
    text = run("adapters", "formats").stdout
    assert [line.split()[0] for line in text.splitlines()] == ["NAME", *rows]
