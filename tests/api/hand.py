"""A worker by hand: what a training worker tells the backlog, without any training.

It opens the data folder as a worker does, with a registry, blobs and holds of its own. Run as a
script it is another process: it claims a job, carries it out, and ends.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gossamer.jobs.backlog import Backlog
from gossamer.jobs.views import Claim, Progress
from gossamer.store.catalog.opening import Store
from gossamer.store.catalog.views import BaseInfo, FileInfo, VersionInfo

if TYPE_CHECKING:
    from tests.api.running import Running

#: seconds; no test is as slow
LEASE = 600.0
ROOT = Path(__file__).parents[2]


@dataclass(frozen=True)
class Hand:
    """The worker."""

    store: Store
    backlog: Backlog

    def claim(self, job_id: str) -> Claim:
        """Claim a job, which must be the next one."""
        claim = self.backlog.claim("by-hand", LEASE)
        assert claim is not None
        assert claim.job.id == job_id
        return claim

    def checkpoint(
        self, claim: Claim, step: int, adapter: bytes, metrics: dict[str, Any]
    ) -> VersionInfo:
        """Upload `name@step-<step>`."""
        job, also = claim.job, self.backlog.checkpointing(claim, step, metrics)
        return self.store.catalog.upload(
            job.tenant, job.adapter, [adapter], tag=f"step-{step}", also=also
        )

    def attach(self, claim: Claim, filename: str, data: bytes) -> FileInfo:
        """Write a result file for the job's tenant."""
        also = self.backlog.attaching(claim)
        with self.store.files.spool() as spool:
            spool.write(data)
            return self.store.files.upload(
                claim.job.tenant, filename, "fine-tune-results", spool, also=also
            )

    def finish(self, claim: Claim, adapter: bytes, trained_tokens: int = 1000) -> VersionInfo:
        """Let the job succeed with this adapter."""
        also = self.backlog.finishing(claim, trained_tokens=trained_tokens)
        return self.store.catalog.upload(claim.job.tenant, claim.job.adapter, [adapter], also=also)


@contextmanager
def at_hand(data: Path, base: BaseInfo) -> Iterator[Hand]:
    """A worker over a data folder."""
    with Store(data, base) as store:
        yield Hand(store, Backlog(store.registry))


def base_of(server: Running) -> BaseInfo:
    """The base of a server, as its workers know it."""
    base = server.services.base
    return BaseInfo(base.name, base.fingerprint, server.services.engine.table)


def carry_out_elsewhere(server: Running, job_id: str, adapter: Path) -> None:
    """Have another process claim the job and let it succeed with the adapter in that file."""
    wanted = {
        "data": str(server.services.settings.data_dir),
        "base": asdict(base_of(server)),
        "job": job_id,
        "adapter": str(adapter),
    }
    command = [sys.executable, "-m", "tests.api.hand"]
    subprocess.run(command, input=json.dumps(wanted), text=True, check=True, cwd=ROOT, timeout=60)


def main() -> None:
    """What the other process does."""
    wanted = json.load(sys.stdin)
    table = {name: tuple(shape) for name, shape in wanted["base"].pop("table").items()}
    with at_hand(Path(wanted["data"]), BaseInfo(**wanted["base"], table=table)) as hand:
        claim = hand.claim(wanted["job"])
        hand.backlog.heartbeat(claim, LEASE, Progress(1, 1))
        hand.finish(claim, Path(wanted["adapter"]).read_bytes())


if __name__ == "__main__":
    main()
