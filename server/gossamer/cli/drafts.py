"""Files and folders that get their name when they are complete."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from gossamer.cli.errors import CommandError


def check_file(file: Path, *, remedy: str, force: bool = False) -> None:
    """Whether a file of this name can be made, looked at before the work for it begins.

    Args:
        remedy: what to do where one is there already.
        force: one that is there will be replaced.

    Raises:
        CommandError
    """
    if file.exists() and not (force and file.is_file()):
        what = "A file is not replaced unasked." if file.is_file() else "It is no file."
        raise CommandError(f"{file} is there already.", what, remedy)
    _check_parent(file)


def check_folder(folder: Path) -> None:
    """Whether a folder of this name can be made, or be taken because it is empty.

    Raises:
        CommandError
    """
    if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        what = "The folder is not empty." if folder.is_dir() else "It is no folder."
        raise CommandError(f"{folder} is there already.", what, "Give a new or an empty folder.")
    if folder.exists():
        _check_writable(folder, folder)
    else:
        _check_parent(folder)


@contextmanager
def draft_of(target: Path) -> Iterator[Path]:
    """A path for a file or folder, which gets the name `target` when the block has ended well, and
    is removed otherwise: half of one never has its name. Links in `target` are followed.

    It lies beside `target`; where that is a folder, which may be a mount point or the one that the
    user is in and so cannot be replaced, inside of it: then what is in the draft moves up.

    Raises:
        CommandError: somebody has put something into the folder meanwhile.
    """
    target = target.resolve()
    inside = target.is_dir()
    name = f".{target.name}.{os.getpid()}.part"
    draft = target / name if inside else target.with_name(name)
    try:
        yield draft
        if inside:
            _move_up(draft, target)
        else:
            draft.replace(target)
    finally:
        if draft.is_dir():
            shutil.rmtree(draft)
        draft.unlink(missing_ok=True)


def _move_up(draft: Path, folder: Path) -> None:
    if any(path != draft for path in folder.iterdir()):
        why = "Something was put into it meanwhile."
        raise CommandError(
            f"{folder} is not empty any more.", why, "Give a new or an empty folder."
        )
    for path in list(draft.iterdir()):
        path.replace(folder / path.name)


def _check_parent(path: Path) -> None:
    _check_writable(path, path.resolve().parent)


def _check_writable(path: Path, folder: Path) -> None:
    if not folder.is_dir() or not os.access(folder, os.W_OK):
        raise CommandError(
            f"{path} cannot be written.",
            f"{folder} is {'not writable' if folder.is_dir() else 'no folder'}.",
            "Give another --out.",
        )
