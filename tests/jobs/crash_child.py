"""What the victim of the crash tests does in one life: a worker's part, from claim to result."""

from __future__ import annotations

import os
from pathlib import Path

from gossamer.jobs.backlog import Backlog
from gossamer.store.catalog.opening import Store
from gossamer.store.failpoints import Hook
from tests.store.support import BASE, make_file, push_file

STEP, CHECKPOINT_SEED, RESULT_SEED = 20, 7, 8
#: the exit status where there is no job to claim
UNCLAIMED = 4
RESULT = b"step,train_loss\n20,0.5\n"


def work(data: Path, hook: Hook, lease: float = 0.0) -> int:
    """Claim a job for so many seconds, upload a checkpoint, a result file and the result."""
    with Store(data, BASE, failpoint=hook, busy_timeout_s=60) as store:
        backlog = Backlog(store.registry)
        claim = backlog.claim(f"pid-{os.getpid()}", lease)
        if claim is None:
            return UNCLAIMED
        tenant, adapter = claim.job.tenant, claim.job.adapter
        store.catalog.upload(
            tenant,
            adapter,
            [make_file(CHECKPOINT_SEED)],
            tag=f"step-{STEP}",
            also=backlog.checkpointing(claim, STEP, {"train_loss": 0.5}),
        )
        also = backlog.attaching(claim)
        push_file(store.files, "r.csv", RESULT, tenant, "fine-tune-results", also=also)
        store.catalog.upload(
            tenant, adapter, [make_file(RESULT_SEED)], also=backlog.finishing(claim)
        )
    return 0
