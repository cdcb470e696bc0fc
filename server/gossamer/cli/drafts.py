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
    _check_parent(folder)


@contextmanager
def draft_of(target: Path) -> Iterator[Path]:
    """A path beside `target` for a file or folder, which gets its name when the block has ended
    well, and is removed otherwise: half of one never has its name."""
    target = target.absolute()
    draft = target.with_name(f".{target.name}.{os.getpid()}.part")
    try:
        yield draft
        draft.replace(target)
    finally:
        if draft.is_dir():
            shutil.rmtree(draft)
        draft.unlink(missing_ok=True)


def _check_parent(path: Path) -> None:
    folder = path.absolute().parent
    if not folder.is_dir() or not os.access(folder, os.W_OK):
        raise CommandError(
            f"{path} cannot be written.",
            f"{folder} is {'not writable' if folder.is_dir() else 'no folder'}.",
            "Give another --out.",
        )
