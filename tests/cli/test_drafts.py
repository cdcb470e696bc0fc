"""Files and folders that appear when they are complete, wherever they are to be."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from gossamer.cli.drafts import check_file, check_folder, draft_of
from gossamer.cli.errors import CommandError
from tests.store.support import ROOT


def fill(folder: Path) -> None:
    """What an export does with `folder`."""
    check_folder(folder)
    with draft_of(folder) as draft:
        draft.mkdir()
        (draft / "a").write_text("a")
        (draft / "inner").mkdir()
        (draft / "inner" / "b").write_text("b")


def new(folder: Path) -> Path:
    return folder / "new"


def empty(folder: Path) -> Path:
    (folder / "empty").mkdir()
    return folder / "empty"


def linked(folder: Path) -> Path:
    (folder / "link").symlink_to(empty(folder))
    return folder / "link"


def dangling(folder: Path) -> Path:
    (folder / "link").symlink_to(folder / "to come")
    return folder / "link"


def here(folder: Path) -> Path:
    os.chdir(empty(folder))
    return Path()


def above(folder: Path) -> Path:
    os.chdir(empty(folder))
    return Path("../other")


@pytest.mark.parametrize("make", [new, empty, linked, dangling, here, above])
def test_a_folder_is_filled_wherever_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, make: Callable[[Path], Path]
) -> None:
    monkeypatch.chdir(tmp_path)  # and back in the end
    folder = make(tmp_path)
    fill(folder)
    assert sorted(path.name for path in folder.iterdir()) == ["a", "inner"]
    assert (folder / "inner" / "b").read_text() == "b"
    assert not list(tmp_path.rglob("*.part"))
    assert (tmp_path / "link").is_symlink() == (make in (linked, dangling))
    with pytest.raises(CommandError, match="not empty"):
        check_folder(folder)


MOUNTED = """
import sys
from pathlib import Path
from tests.cli.test_drafts import fill
fill(Path(sys.argv[1]))
print(sorted(path.name for path in Path(sys.argv[1]).iterdir()))
"""


def test_a_mount_point_is_filled(tmp_path: Path) -> None:
    """A real one, in a mount namespace of our own."""
    if shutil.which("unshare") is None:
        pytest.skip("unshare is not installed")
    mount = f"mount -t tmpfs -o size=1m none {tmp_path}"
    if subprocess.run(["unshare", "-Urm", "sh", "-c", mount], capture_output=True).returncode:
        pytest.skip("this system allows no user namespaces")
    command = [sys.executable, "-c", MOUNTED, str(tmp_path)]
    done = subprocess.run(
        ["unshare", "-Urm", "sh", "-c", f'{mount} && exec "$@"', "sh", *command],
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])},
    )
    assert done.stdout == "['a', 'inner']\n", done.stderr


@pytest.mark.parametrize("make", [new, empty])
def test_half_a_folder_is_not_there(tmp_path: Path, make: Callable[[Path], Path]) -> None:
    folder = make(tmp_path)
    before = sorted(tmp_path.rglob("*"))

    def fail() -> None:
        with draft_of(folder) as draft:
            draft.mkdir()
            (draft / "a").write_text("a")
            raise LookupError

    with pytest.raises(LookupError):
        fail()
    assert sorted(tmp_path.rglob("*")) == before


def test_what_was_put_there_meanwhile_stays(tmp_path: Path) -> None:
    def interfere() -> None:
        with draft_of(tmp_path) as draft:
            draft.mkdir()
            (draft / "a").write_text("ours")
            (tmp_path / "a").write_text("theirs")

    with pytest.raises(CommandError, match="not empty any more"):
        interfere()
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("a", "theirs")]


def test_a_file_behind_a_link_is_replaced_and_not_the_link(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("old")
    link = tmp_path / "link"
    link.symlink_to(tmp_path / "file")
    check_file(link, remedy="", force=True)
    with draft_of(link) as draft:
        draft.write_text("new")
    assert link.is_symlink()
    assert (tmp_path / "file").read_text() == "new"


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    for folder in (tmp_path, tmp_path / "new"):
        with pytest.raises(CommandError, match="not writable"):
            check_folder(folder)
    tmp_path.chmod(0o700)
