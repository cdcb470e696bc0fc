"""A run's work folder: what it needs to go on after its process was killed.

Each phase of a run has a folder of its own. While it lasts the Trainer's checkpoints lie there;
when it has ended they are replaced by its result, so a resumed run skips it. Whatever is complete
carries a mark that is written last, and nothing without a mark is ever read.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from gossamer.training.errors import WorkFolderError
from gossamer.training.sparse import TrainedLayer

#: Of what lies in a work folder; 2: evaluations have an exact match.
FORMAT = 2
_MARK = "complete"
_RESULT, _NOTES, _HISTORY = "result.safetensors", "notes.json", "history.json"
_RUN, _ADAPTERS = "run.json", "adapters.json"
_CHECKPOINT, _VALUES = "checkpoint-", "values.safetensors"


@dataclass(frozen=True)
class Result:
    """What a phase leaves: tensors by name, and JSON values."""

    tensors: Mapping[str, Tensor]
    notes: Mapping[str, Any]


def adopt(folder: Path, number: int) -> Path:
    """The folder of an attempt, begun with what the newest attempt before it has kept.

    Every attempt writes into a folder of its own, and what is taken over is copied: whoever made an
    attempt before may still be alive and write, but nobody reads that any more. What another
    version of this program has kept, in a format of its own, is left: the job begins anew.

    Args:
        folder: of the job; made if missing.
        number: of this attempt; larger than those before.
    """
    mine, left = folder / f"attempt-{number}", folder / f"left-{number}"
    folder.mkdir(parents=True, exist_ok=True)
    before = sorted([*folder.glob("attempt-*"), *folder.glob("left-*")], key=_age)
    if _set_aside(before, left) and _format_of(left) == FORMAT:
        taken = folder / f"taking-{number}"
        shutil.rmtree(taken, ignore_errors=True)
        shutil.copytree(left, taken, ignore=_unfinished)
        taken.replace(mine)
    else:
        mine.mkdir()
    for path in (*before, left):
        shutil.rmtree(path, ignore_errors=True)
    return mine


def abandon(folder: Path, number: int) -> None:
    """Remove what an attempt has written, and nothing of another one.

    An attempt may do this without asking whether the job is still its own: if a newer one has
    begun, it has taken the folder over or finds it gone, and its own stays.

    Args:
        folder: of the job.
        number: of the attempt.
    """
    for kind in ("attempt", "left", "taking"):
        gone = folder / f"gone-{kind}-{number}"
        # Renamed first: a folder that is being removed could be taken over, half of it. What
        # cannot be renamed is not there, is another's by now, or stays until the job ends.
        with suppress(OSError):
            (folder / f"{kind}-{number}").replace(gone)
        shutil.rmtree(gone, ignore_errors=True)


def _set_aside(before: Sequence[Path], left: Path) -> bool:
    """Rename the newest folder that is still there; whether there was one. Its attempt may be alive
    and abandon it at this moment."""
    for path in reversed(before):
        with suppress(FileNotFoundError):
            # Out of the reach of whoever made it: paths inside it are no more.
            path.replace(left)
            return True
    return False


def _format_of(folder: Path) -> int:
    """Of a run's folder; ours if nothing has been kept there yet."""
    known = folder / _RUN
    return int(json.loads(known.read_text()).get("format", 1)) if known.exists() else FORMAT


def _age(path: Path) -> tuple[int, bool]:
    """Newest last: an attempt is newer than what it was begun with."""
    kind, _, number = path.name.rpartition("-")
    return int(number), kind == "attempt"


def _unfinished(folder: str, names: list[str]) -> list[str]:
    """Checkpoints without a mark, and files that were being written."""
    here = Path(folder)
    return [
        name
        for name in names
        if name.endswith(".part")
        or (name.startswith(_CHECKPOINT) and not (here / name / _MARK).exists())
    ]


class WorkFolder:
    """The folder of one run.

    Args:
        path: made if missing.
        run: what identifies the run (its settings, the digests of its data and base): a folder of
            another run is refused, for its checkpoints would be mixed up with ours.

    Raises:
        WorkFolderError: the folder holds another run, or was written in another format.
    """

    def __init__(self, path: Path, run: Mapping[str, Any]) -> None:
        self.path = path
        path.mkdir(parents=True, exist_ok=True)
        known = path / _RUN
        text = json.dumps({"format": FORMAT, **run}, sort_keys=True)
        if known.exists():
            if _format_of(path) != FORMAT:
                raise WorkFolderError(path, "another version of this program has written it")
            if known.read_text() != text:
                raise WorkFolderError(path)
        else:
            _write(known, text)

    def expect(self, reference: str, digest: str) -> None:
        """An adapter of the run, by the name it was given: a name may come to mean another one.

        Raises:
            WorkFolderError: it has, since the run began.
        """
        file = self.path / _ADAPTERS
        known: dict[str, str] = json.loads(file.read_text()) if file.exists() else {}
        if reference not in known:
            _write(file, json.dumps({**known, reference: digest}))
        elif known[reference] != digest:
            raise WorkFolderError(self.path)

    def phase(self, name: str) -> PhaseFolder:
        """The folder of a phase."""
        return PhaseFolder(self.path / name)


class PhaseFolder:
    """One phase's checkpoints, then its result."""

    def __init__(self, path: Path) -> None:
        self.path = path
        path.mkdir(exist_ok=True)

    def result(self) -> Result | None:
        """What the phase left, if it has ended."""
        if not (self.path / _MARK).exists():
            return None
        with safe_open(self.path / _RESULT, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        return Result(tensors, json.loads((self.path / _NOTES).read_text()))

    def finish(self, result: Result) -> None:
        """Keep the result, durable, and drop the checkpoints."""
        save_file(dict(result.tensors), self.path / _RESULT)
        _sync(self.path / _RESULT)
        _write(self.path / _NOTES, json.dumps(result.notes))
        _write(self.path / _MARK, "")
        for checkpoint in self.path.glob(_CHECKPOINT + "*"):
            shutil.rmtree(checkpoint)

    def seal(self, step: int, history: Mapping[str, Any]) -> None:
        """The Trainer has written the checkpoint of a step: add the history, make it durable, and
        drop those before it."""
        checkpoint = self.path / f"{_CHECKPOINT}{step}"
        _write(checkpoint / _HISTORY, json.dumps(history))
        for file in checkpoint.iterdir():
            _sync(file)
        _write(checkpoint / _MARK, "")
        _sync(self.path)
        for other in self.path.glob(_CHECKPOINT + "*"):
            if other != checkpoint:
                shutil.rmtree(other)

    def latest(self) -> tuple[Path, dict[str, Any]] | None:
        """The newest complete checkpoint and its history."""
        found = [path for path in self.path.glob(_CHECKPOINT + "*") if (path / _MARK).exists()]
        if not found:
            return None
        newest = max(found, key=step_of)
        return newest, json.loads((newest / _HISTORY).read_text())


def save_layers(layers: Mapping[str, TrainedLayer], checkpoint: Path) -> None:
    """Write what is trained, by `<weight>|<name of the tensor>`, into a folder, made if missing."""
    checkpoint.mkdir(parents=True, exist_ok=True)
    state = {
        f"{weight}|{name}": tensor.detach().cpu().contiguous()
        for weight, layer in layers.items()
        for name, tensor in layer.trained_state().items()
    }
    save_file(state, checkpoint / _VALUES)


def load_layers(layers: Mapping[str, TrainedLayer], checkpoint: Path) -> None:
    """Give the layers back what `save_layers` has written of them, and the model with them."""
    state = load_file(checkpoint / _VALUES)
    for weight, layer in layers.items():
        mine = {
            key.rpartition("|")[2]: t for key, t in state.items() if key.startswith(f"{weight}|")
        }
        layer.load_trained_state(mine)
        layer.write()


def step_of(checkpoint: Path) -> int:
    """The step of its phase after which a checkpoint was made."""
    return int(checkpoint.name.removeprefix(_CHECKPOINT))


def _write(path: Path, text: str) -> None:
    """Whole and durable, or not at all."""
    part = path.with_suffix(".part")
    part.write_text(text)
    _sync(part)
    part.replace(path)
    _sync(path.parent)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
