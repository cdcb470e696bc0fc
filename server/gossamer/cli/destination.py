"""Where a trained adapter goes: a file, the data folder's catalog, a server; looked at before the
training begins, because a mistake that shows after it costs all of it."""

from __future__ import annotations

import tempfile
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from gossamer.cli.drafts import check_file
from gossamer.cli.errors import CommandError
from gossamer.cli.stores import open_store

if TYPE_CHECKING:
    from sqlalchemy.orm import Session

    from gossamer.api.settings import Settings
    from gossamer.base.load import BaseFiles
    from gossamer.cli.output import Output
    from gossamer.store.catalog.opening import Store
    from gossamer.store.delta import DeltaSet
    from gossamer.training.run import TrainResult


@dataclass(eq=False)
class Destination:
    """What to do with a result.

    Attributes:
        settings: whose data folder and databases are meant.
        push: the adapter's name, when it is to be kept.
        out: the file, when it is to be written.
        tenant: whose adapter it is, in the data folder.
        activate: whether the bare name means it from then on.
        url, key: the server to push to; None is the data folder.
    """

    settings: Settings
    push: str | None
    out: Path | None
    tenant: str
    activate: bool
    url: str | None
    key: str
    base: BaseFiles | None = None
    _is_full: bool = False
    _checkpoints: dict[str, str] = field(default_factory=dict)  # tag → digest, the last one last

    def check(self, base: BaseFiles) -> None:
        """Whether a result for `base` can go there.

        Raises:
            CommandError, CatalogError
        """
        self.base = base
        if self.out is not None:
            check_file(self.out, remedy="Give another --out.")
        if self.push is None:
            return
        if self.url is not None:
            check_server(self.url, self.key, self.push, base)
        else:
            with self._store():
                pass

    def keep(self, result: TrainResult, output: Output) -> dict[str, Any]:
        """Put it there; what programs are told of it."""
        kept: dict[str, Any] = {"file": None, "bytes": None, "version": None}
        with tempfile.TemporaryDirectory(prefix="gossamer-train-") as folder:
            file = Path(folder) / "adapter.safetensors" if self.out is None else self.out
            result.save(file)
            kept["bytes"] = file.stat().st_size
            if self.out is not None:
                kept["file"] = str(file)
            if self.push is not None:
                kept["version"] = self._push(self.push, file, output)
        return kept

    def keep_checkpoint(
        self, output: Output, step: int, adapter: DeltaSet, metrics: Mapping[str, float]
    ) -> None:
        """Put a run's adapter as it stands into the data folder, as `name@step-N`; as many as a job
        keeps, and then the oldest goes. One for which the tenant has no room is left out: the run
        goes on."""
        from gossamer.store.catalog.errors import QuotaExceeded
        from gossamer.store.format import write

        del metrics  # they are told to whoever watches the run
        if self.push is None:
            raise RuntimeError("a checkpoint has the name of an adapter")
        with tempfile.TemporaryDirectory(prefix="gossamer-train-") as folder:
            file = Path(folder) / "adapter.safetensors"
            write(adapter, file)
            tag = f"step-{step}"
            try:
                with self._store() as store:
                    kept = store.catalog.upload(
                        self.tenant, self.push, file, activate=False, tag=tag,
                        outdated=self._outdated,
                    )  # fmt: skip
                self._checkpoints[tag] = kept.digest
            except QuotaExceeded as error:
                if not self._is_full:
                    output.note(f"Warning: the checkpoint of step {step} is not kept: {error}")
                self._is_full = True

    def _outdated(self, session: Session) -> Collection[str]:
        """Tags of this run's checkpoints that the next one takes the place of."""
        from gossamer.jobs.reading import outdated_tags
        from gossamer.store.registry.tenants import lock_tenant

        tenant, keep = lock_tenant(session, self.tenant), self.settings.limits.checkpoints_per_job
        newest_first = list(reversed(self._checkpoints.items()))
        return outdated_tags(session, tenant.id, newest_first, keep)

    def _push(self, name: str, file: Path, output: Output) -> dict[str, Any]:
        if self.url is not None:
            from gossamer.cli.adapters import push_file
            from gossamer.cli.remote import Server

            with Server(self.url, self.key) as server:
                return push_file(server, name, file, output, activate=self.activate)
        with self._store() as store:
            version = store.catalog.upload(self.tenant, name, file, activate=self.activate)
        return {
            "id": version.label,
            "name": version.name,
            "version": version.number,
            "digest": version.digest,
            "bytes": version.nbytes,
            "nnz": version.nnz,
            "density": version.density,
            "current": version.current,
            "warnings": list(version.warnings),
        }

    def _store(self) -> Store:
        """The data folder, beside a server that may run on it; the tenant is there."""
        from gossamer.store.catalog.names import check_new_name
        from gossamer.store.registry.tenants import ensure_tenant, lock_tenant

        if self.base is None or self.push is None:
            raise RuntimeError("check comes first")
        check_new_name(self.push, self.base.name)
        store = open_store(self.settings, self.base)
        try:
            with store.registry.write() as session:
                if self.tenant == self.settings.first_tenant:
                    # the server would make it at its first start
                    ensure_tenant(session, self.tenant, datetime.now(UTC))
                else:
                    lock_tenant(session, self.tenant)
        except BaseException:
            store.close()
            raise
        return store


class Model(Protocol):
    """A base model, by its name and its fingerprint."""

    @property
    def name(self) -> str:
        """For people."""

    @property
    def fingerprint(self) -> str:
        """Which model it is."""


def check_server(url: str, key: str, name: str, base: Model) -> None:
    """Whether the server will take an adapter of that name, made for that base: it answers, the key
    is good, it runs the same base, and the name can be one.

    Raises:
        CommandError, InvalidName, ReservedName
    """
    from gossamer.cli.remote import Server
    from gossamer.store.catalog.names import check_new_name

    check_new_name(name, base.name)
    with Server(url, key) as server:
        served = server.call("GET", "/version")
    if served.get("base_fingerprint") != base.fingerprint:
        raise CommandError(
            "The server runs another base model.",
            f"It serves {served.get('base')} ({str(served.get('base_fingerprint'))[:16]}…), "
            f"and {base.name} is {base.fingerprint[:16]}….",
            "Give the server's base with --base.",
        )
