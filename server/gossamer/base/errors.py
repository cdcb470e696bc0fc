"""What can go wrong with a base model's files.

The three lines of an `ExplainedError` are attributes, so a caller may print them one under another
or send them as fields; the data they were made of is kept beside them.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path


class ExplainedError(Exception):
    """What happened, why, and what to do about it.

    Attributes:
        what: what happened, one line.
        why: the reason, one line.
        remedy: what can be done, one line.
    """

    def __init__(self, what: str, why: str, remedy: str) -> None:
        super().__init__(what, why, remedy)
        self.what = what
        self.why = why
        self.remedy = remedy

    def __str__(self) -> str:
        return f"{self.what}: {self.why}. {self.remedy}."


class BaseModelError(ExplainedError):
    """The base model cannot be used."""


class UnknownBaseError(BaseModelError):
    """The spec is neither a known name nor a path that exists."""

    def __init__(self, spec: str, known: Sequence[str]) -> None:
        super().__init__(
            f"there is no base model {spec!r}",
            f"it is not one of {', '.join(known)} and no such directory, .gguf or .whl file exists",
            "Give a name from that list, the path of a Hugging Face directory or a GGUF file, or a "
            "model of the Hub as owner/name@<commit>",
        )
        self.spec = spec
        self.known = tuple(known)


class MissingFilesError(BaseModelError):
    """A Hugging Face directory lacks files that a base model needs."""

    def __init__(self, path: Path, missing: Sequence[str]) -> None:
        super().__init__(
            f"{path} is not a complete model directory",
            f"missing: {', '.join(missing)}",
            "Copy the whole directory of the model: config.json, the safetensors, the tokenizer",
        )
        self.path = path
        self.missing = tuple(missing)


class PickledWeightsError(BaseModelError):
    """The weights are pickles. Reading a pickle runs the code in it, so it is never opened.

    `path` is a directory, or a repository of the Hub.
    """

    def __init__(self, path: Path | str, files: Sequence[str]) -> None:
        super().__init__(
            f"{path} holds pickled weights",
            f"{', '.join(files)}: opening a pickle runs whatever code it contains",
            "Convert them on a machine you trust: load with transformers, then save_pretrained",
        )
        self.path = path
        self.files = tuple(files)


class UnsupportedBaseError(BaseModelError):
    """The model was understood, but it could not be served right."""

    def __init__(self, name: str, reason: str, remedy: str) -> None:
        super().__init__(f"{name} cannot be used as a base model", reason, remedy)
        self.name = name
        self.reason = reason


class CorruptBaseError(BaseModelError):
    """A file of the base model does not hold what its format promises."""

    def __init__(self, path: Path, reason: str) -> None:
        super().__init__(f"{path} cannot be read", reason, "Fetch or copy the file again")
        self.path = path
        self.reason = reason


class ChecksumMismatchError(BaseModelError):
    """A file is not the one that was pinned; nothing in it has been opened."""

    def __init__(self, source: str, expected: str, actual: str) -> None:
        super().__init__(
            f"{source} is not the expected file",
            f"its sha256 is {actual}, not {expected}",
            "Fetch it again, from where it is published or another mirror of it",
        )
        self.source = source
        self.expected = expected
        self.actual = actual


class IndexUnavailableError(BaseModelError):
    """The package index gave no usable answer for a project."""

    def __init__(self, url: str, reason: str) -> None:
        super().__init__(
            f"the package index {url} cannot be used",
            reason,
            "Check the network and the index URL, or fetch the wheel elsewhere and give its path",
        )
        self.url = url
        self.reason = reason


class DownloadError(BaseModelError):
    """A download stopped and did not continue; what has arrived is kept for the next attempt."""

    def __init__(self, url: str, received: int, size: int, reason: str) -> None:
        super().__init__(
            f"the download of {url} stopped after {received} of {size} bytes",
            reason,
            "Start again: the download continues where it stopped",
        )
        self.url = url
        self.received = received
        self.size = size
        self.reason = reason


class UnpinnedBaseError(BaseModelError):
    """A model of the Hub without the commit that says which model it is.

    Attributes:
        repository: `owner/name`.
        commit: what its branch, or the branch or tag that was given, is at now; None if the Hub did
            not say.
    """

    def __init__(self, spec: str, repository: str, commit: str | None) -> None:
        super().__init__(
            f"{spec!r} does not say which model it is",
            "no such directory exists, and on the Hub a name, a branch or a tag may mean another "
            "model tomorrow: adapters need this one",
            f"Give {repository}@{commit}, the commit that it has now"
            if commit
            else f"Give {repository}@<commit>, with the 40 digits of a commit from its page on the "
            "Hub",
        )
        self.spec = spec
        self.repository = repository
        self.commit = commit


class HubUnavailableError(BaseModelError):
    """The Hub gave no usable answer. Files that have arrived are kept for the next attempt."""

    def __init__(self, url: str, reason: str) -> None:
        super().__init__(
            f"the Hub at {url} cannot be used",
            reason,
            "Check the network and HF_ENDPOINT and start again, or copy the model's files here and "
            "give the path of their directory",
        )
        self.url = url
        self.reason = reason


class HubRefusedError(BaseModelError):
    """The Hub does not have this model at this commit, or not for us; it may not say which."""

    def __init__(self, spec: str, reason: str) -> None:
        super().__init__(
            f"the Hub does not give us {spec}",
            reason,
            "Check the name and the commit; for a private or gated model accept its terms on its "
            "page and set HF_TOKEN to a token that may read it",
        )
        self.spec = spec
        self.reason = reason


class NoRoomError(BaseModelError):
    """The disk has no room for the base model's files."""

    def __init__(self, folder: Path, needed: int | None, free: int) -> None:
        super().__init__(
            f"the base model does not fit into {folder}",
            f"{free} bytes are free" + (f" and {needed} are needed" if needed else ""),
            "Make room, or give another data folder",
        )
        self.folder = folder
        self.needed = needed
        self.free = free
