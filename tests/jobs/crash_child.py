"""The victim of the crash tests: a worker that dies by SIGKILL, over and over.

Run as a script. It imports once and forks for each line on stdin, a JSON object:

    data    the data folder
    point   the failpoint to die at
    nth     the how-manieth passing of it
    lease   of the claim, in seconds

Each child claims a job, uploads a checkpoint, a result file and the result, and reports its lease
lost as exit status 3. The answer on stdout is the status as `os.waitpid` gives it: 9 for SIGKILL.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

from gossamer.jobs.backlog import Backlog
from gossamer.store.catalog.opening import Store
from gossamer.store.failpoints import Failpoint, KillAt
from tests.store.support import BASE, make_file, push_file

STEP, CHECKPOINT_SEED, RESULT_SEED = 20, 7, 8
RESULT = b"step,train_loss\n20,0.5\n"


def work(order: dict[str, Any]) -> int:
    """One worker's life; its exit status."""
    hook = KillAt(Failpoint(order["point"]), order["nth"])
    with Store(Path(order["data"]), BASE, failpoint=hook, busy_timeout_s=60) as store:
        backlog = Backlog(store.registry)
        claim = backlog.claim(f"pid-{os.getpid()}", order["lease"])
        if claim is None:
            return 4
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


def main() -> None:
    """Answer every line of stdin."""
    for line in sys.stdin:
        child = os.fork()
        if child == 0:
            status = 1
            try:
                status = work(json.loads(line))
            finally:
                sys.stderr.flush()
                os._exit(status)
        _, status = os.waitpid(child, 0)
        print(status, flush=True)  # noqa: T201


if __name__ == "__main__":
    main()
