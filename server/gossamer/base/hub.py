"""A base from the Hugging Face Hub: one commit of a repository, safetensors only.

What the Hub is, and who we are there, huggingface_hub reads by itself: `HF_ENDPOINT`, and
`HF_TOKEN` or what `hf auth login` stored. We never see the token.
"""

from __future__ import annotations

import errno
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn, cast

from huggingface_hub import HfApi, ModelInfo, constants, hf_hub_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from huggingface_hub.utils import tqdm, validate_repo_id  # type: ignore[attr-defined]

from gossamer.base.directory import PICKLES, TOKENIZERS, check_configuration
from gossamer.base.errors import (
    ChecksumMismatchError,
    DownloadError,
    HubRefusedError,
    HubUnavailableError,
    NoRoomError,
    PickledWeightsError,
    UnpinnedBaseError,
    UnsupportedBaseError,
)
from gossamer.base.fetch import Progress, sha256_of, silent
from gossamer.base.load import INDEX, SINGLE, weight_files

#: What is fetched beside the weights. Nothing that could run is: remote code never does.
CONFIGURATION = ("config.json", "generation_config.json")
TOKENIZER = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
)
ANSWER_S = 20.0
#: What stays free on the disk: the registry beside it must be able to grow.
MARGIN_BYTES = 64 << 20

_CREDENTIALS = re.compile(r"//[^/\s]*@")
_COMMIT = re.compile(r"[0-9a-f]{40}", re.IGNORECASE)
#: The error of its HTTP client, without naming it: httpx in release 1, httpx2 in release 2.
_HTTP_ERROR = cast(type[Exception], HfHubHTTPError.__mro__[1])


@dataclass(frozen=True)
class HubModel:
    """A model of the Hub, as a spec names it.

    Attributes:
        repository: `owner/name`.
        revision: what came after the `@`; None if nothing did.
    """

    repository: str
    revision: str | None

    @property
    def commit(self) -> str | None:
        """The revision, if it is a whole commit: 40 hexadecimal digits."""
        revision = self.revision
        return revision.lower() if revision and _COMMIT.fullmatch(revision) else None

    @property
    def name(self) -> str:
        """What people call it."""
        return self.repository.partition("/")[2]

    @property
    def folder(self) -> str:
        """Under which its files are kept. No name on the Hub has two hyphens in a row."""
        return f"{self.repository.replace('/', '--')}@{(self.commit or '')[:12]}"

    @property
    def spec(self) -> str:
        """As it was given."""
        return f"{self.repository}@{self.revision}" if self.revision else self.repository


@dataclass(frozen=True)
class RemoteFile:
    """A file at the commit: its size in bytes, and its sha256 if the Hub knows it (Git LFS)."""

    name: str
    size: int
    sha256: str | None


def named(spec: str) -> HubModel | None:
    """The model of the Hub that a spec names; None if no model there could have that name."""
    repository, at, revision = spec.partition("@")
    if repository.count("/") != 1 or (at and not revision):
        return None
    try:
        validate_repo_id(repository)
    except HFValidationError:
        return None
    return HubModel(repository, revision or None)


def refuse_unpinned(model: HubModel, hub_url: str | None = None) -> NoReturn:
    """Tell how to pin a model: to the commit that its branch has now, if the Hub answers.

    Raises:
        UnpinnedBaseError: in any case but this one:
        HubRefusedError: the Hub does not have the model.
    """
    commit: str | None = None
    try:
        commit = _look_up(model, hub_url, files=False).sha
    except HubRefusedError as error:  # more often than not, it was meant as a path
        reason = f"no such directory exists, and {error.reason}"
        raise HubRefusedError(model.spec, reason) from error
    except HubUnavailableError:
        pass  # it is refused all the same, and the remedy says where commits are found
    raise UnpinnedBaseError(model.spec, model.repository, commit)


def fetch_model(
    model: HubModel,
    downloads: Path,
    out: Path,
    *,
    hub_url: str | None = None,
    progress: Progress,
) -> None:
    """Bring the model's files into the new directory `out`, each of the size, and the sha256, that
    the Hub lists for the commit.

    They are collected in `downloads`, on the same file system, and stay there for the caller to
    remove once it has a result: whatever fails until then, files that are whole need not be fetched
    again.

    Raises:
        HubUnavailableError, HubRefusedError
        PickledWeightsError, UnsupportedBaseError: before anything large is fetched.
        DownloadError, ChecksumMismatchError: a file is not the listed one; it is removed.
        NoRoomError
    """
    listed = _listing(model, hub_url)
    wanted = _small_files(model, listed)
    downloads.mkdir(parents=True, exist_ok=True)
    with _no_room(downloads):
        transfer = _Transfer(model, downloads, hub_url)
        _check_room(downloads, wanted)
        transfer.bring(wanted, silent)
        check_configuration(model.repository, downloads / "config.json")
        weights = _weights(model, listed, downloads)
        _check_room(downloads, weights)
        transfer.bring(weights, progress)
        out.mkdir()
        for file in (*wanted, *weights):
            _place(downloads / file.name, out / file.name)


def _place(fetched: Path, target: Path) -> None:
    """A file under one more name: no bytes are written where the file system has hard links."""
    try:
        os.link(fetched, target)
    except OSError:
        shutil.copyfile(fetched, target)


def _listing(model: HubModel, hub_url: str | None) -> Mapping[str, RemoteFile]:
    """Name → file, of the files in the repository's root at the commit."""
    info = _look_up(model, hub_url, files=True)
    if info.sha != model.commit:
        raise HubUnavailableError(_shown(hub_url), f"asked for {model.commit}, got {info.sha}")
    listed = {}
    for entry in info.siblings or ():
        name, size, lfs = entry.rfilename, entry.size, entry.lfs
        if "/" in name or "\\" in name:
            continue
        if size is None:
            raise HubUnavailableError(_shown(hub_url), "its list of files has no sizes")
        listed[name] = RemoteFile(name, size, lfs.sha256 if lfs else None)
    return listed


def _look_up(model: HubModel, hub_url: str | None, *, files: bool) -> ModelInfo:
    api = HfApi(endpoint=hub_url, library_name="gossamer")
    revision = model.commit or model.revision
    try:
        with _answers(model, hub_url):
            return api.model_info(
                model.repository, revision=revision, files_metadata=files, timeout=ANSWER_S
            )
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise HubUnavailableError(_shown(hub_url), "its answer is not that of a Hub") from error


def _small_files(model: HubModel, listed: Mapping[str, RemoteFile]) -> list[RemoteFile]:
    """The configuration, the tokenizer and the index of the weights.

    Raises:
        PickledWeightsError, UnsupportedBaseError: this repository is no base.
    """
    if "adapter_config.json" in listed:
        raise UnsupportedBaseError(
            model.spec, "adapter_config.json makes it an adapter", "Give the base model's name"
        )
    pickles = [name for name in listed for kind in PICKLES if Path(name).match(kind)]
    if SINGLE not in listed and INDEX not in listed and pickles:
        raise PickledWeightsError(model.spec, sorted(pickles))
    missing = [name for name in ("config.json",) if name not in listed]
    if SINGLE not in listed and INDEX not in listed:
        missing.append(SINGLE)
    if not any(all(name in listed for name in names) for names in TOKENIZERS):
        missing.append("tokenizer.json")
    if missing:
        raise UnsupportedBaseError(
            model.spec,
            f"missing: {', '.join(missing)}",
            "Give a repository with a whole model: config.json, the safetensors, the tokenizer",
        )
    names = [*CONFIGURATION, *TOKENIZER]
    names += [] if SINGLE in listed else [INDEX]  # where both are there, the index is not read
    return [listed[name] for name in names if name in listed]


def _weights(model: HubModel, listed: Mapping[str, RemoteFile], folder: Path) -> list[RemoteFile]:
    """The safetensors that will be read. A repository may hold the same weights twice."""
    names = [SINGLE] if SINGLE in listed else [_relative(f, folder) for f in weight_files(folder)]
    unknown = [name for name in names if name not in listed or not name.endswith(".safetensors")]
    if unknown or not names:
        raise UnsupportedBaseError(
            model.spec,
            f"{INDEX} names {', '.join(unknown) or 'no files'}, no safetensors of the repository",
            "Give another commit, or another repository",
        )
    return [listed[name] for name in names]


def _relative(path: Path, folder: Path) -> str:
    return str(path.relative_to(folder)) if path.is_relative_to(folder) else str(path)


class _Transfer:
    """Brings files of a model into a folder, one after the other: the library fetches the parts of
    a file in parallel where that helps."""

    def __init__(self, model: HubModel, folder: Path, hub_url: str | None) -> None:
        self._model = model
        self._folder = folder
        self._hub_url = hub_url

    def bring(self, files: list[RemoteFile], progress: Progress) -> None:
        """Each as it is listed."""
        total, before = sum(file.size for file in files), 0
        for file in files:
            bar = _counting(file, before, total, progress)
            path = self._folder / file.name
            kept = path.exists()
            self._fetch(file, bar)
            wrong = self._wrong(path, file)
            if wrong is not None and kept:
                # A machine that lost power may have kept a file of the right name and wrong bytes.
                path.unlink()
                self._fetch(file, bar)
                wrong = self._wrong(path, file)
            if wrong is not None:
                path.unlink()
                raise wrong
            before += file.size
            progress("download", before, total)

    def _fetch(self, file: RemoteFile, bar: type[tqdm]) -> None:
        with _answers(self._model, self._hub_url):
            hf_hub_download(
                self._model.repository,
                file.name,
                revision=self._model.commit,
                local_dir=self._folder,
                endpoint=self._hub_url,
                library_name="gossamer",
                tqdm_class=bar,
            )

    def _wrong(self, path: Path, file: RemoteFile) -> DownloadError | ChecksumMismatchError | None:
        """Why it is not the listed file, or None. The library itself checks no more than the size
        that the file's own reply declares. Reads the file once."""
        source, actual = f"{file.name} of {self._model.spec}", path.stat().st_size
        if actual != file.size:
            return DownloadError(source, actual, file.size, "the Hub lists a file of another size")
        if file.sha256 is None or (sha256 := sha256_of(path)) == file.sha256:
            return None
        return ChecksumMismatchError(source, file.sha256, sha256)


def _counting(file: RemoteFile, before: int, total: int, progress: Progress) -> type[tqdm]:
    """A bar that draws nothing and reports the bytes of a file, `before` of which are others'.

    The library may make several for one file, of bytes received and of bytes written, which count
    the same ones: the largest counts.
    """
    most = 0

    class Bar(tqdm):
        def __init__(self, *args: Any, **options: Any) -> None:
            super().__init__(*args, **(options | {"disable": True}))
            self.count = 0

        def update(self, n: float | None = 1) -> bool | None:
            nonlocal most
            self.count += int(n or 0)
            most = max(most, min(self.count, file.size))
            progress("download", before + most, total)
            return None

    return Bar


def _check_room(folder: Path, files: list[RemoteFile]) -> None:
    absent = [file for file in files if not (folder / file.name).exists()]
    needed, free = sum(file.size for file in absent), shutil.disk_usage(folder).free
    if needed + MARGIN_BYTES > free:
        raise NoRoomError(folder, needed + MARGIN_BYTES, free)


@contextmanager
def _no_room(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise NoRoomError(folder, None, shutil.disk_usage(folder).free) from error


@contextmanager
def _answers(model: HubModel, hub_url: str | None) -> Iterator[None]:
    """The library's errors as ours."""
    try:
        yield
    except HfHubHTTPError as error:
        status = error.response.status_code
        if status in (401, 403, 404):
            raise HubRefusedError(model.spec, _reason(error, status)) from error
        raise HubUnavailableError(_shown(hub_url), f"it answered {status}") from error
    except OSError as error:
        if error.errno is not None:  # the disk's
            raise
        raise HubUnavailableError(_shown(hub_url), _line(error.__cause__ or error)) from error
    except (_HTTP_ERROR, RuntimeError) as error:  # the latter is what hf_xet raises
        raise HubUnavailableError(_shown(hub_url), _line(error)) from error


def _reason(error: HfHubHTTPError, status: int) -> str:
    kind = error.response.headers.get("X-Error-Code") or type(error).__name__
    return f"the Hub answered {status}, {kind}"


def _line(error: BaseException) -> str:
    return _public(" ".join(str(error).split())) or type(error).__name__


def _shown(hub_url: str | None) -> str:
    return _public(hub_url or constants.ENDPOINT)


def _public(text: str) -> str:
    """The text without the names and passwords that addresses in it may hold."""
    return _CREDENTIALS.sub("//", text)
