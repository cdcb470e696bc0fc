"""The victim of the crash tests: for every job on stdin, fork, work, and die by SIGKILL.

Run as a script. It imports once and forks for each job, before anything has started a thread, so 50
crashes cost 50 forks and not 50 starts of the interpreter. A job is a JSON object:

    data    the data folder
    point   the failpoint to die at
    nth     the how-manieth passing of it
    threads for each worker its list of ["upload", name, seed] and ["delete", name] of adapters, and
            of ["put", name, seed] and ["drop", name] of files: the latter drops the oldest one

What a worker is about to do and what was acknowledged to it goes to `journal` in the data folder,
one line each, by single writes that outlive the process. The answer on stdout is the job's exit
status as `os.waitpid` gives it: 9 for SIGKILL.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import threading
from pathlib import Path
from typing import Any

from gossamer.store.catalog.door import Catalog
from gossamer.store.catalog.errors import AdapterNotFound
from gossamer.store.catalog.opening import Store
from gossamer.store.failpoints import Failpoint, KillAt
from tests.store.support import BASE, make_file, push_file


def perform(catalog: Catalog, kind: str, name: str, seed: int = 0) -> None:
    """One operation. An adapter and a file of one seed have the same bytes, and so share a blob."""
    if kind == "upload":
        catalog.upload("acme", name, [make_file(seed)])
    elif kind == "delete":
        with contextlib.suppress(AdapterNotFound):
            catalog.delete("acme", name)
    elif kind == "put":
        push_file(catalog.files, name, make_file(seed))
    else:
        mine = [f for f in catalog.files.list("acme", order="asc").items if f.filename == name]
        for file in mine[:1]:
            catalog.files.delete("acme", file.id)


def work(job: dict[str, Any]) -> None:
    """Do a job's operations, each thread its own."""
    data = Path(job["data"])
    journal = os.open(data / "journal", os.O_WRONLY | os.O_APPEND | os.O_CREAT)

    def note(what: str, operation: list[Any]) -> None:
        os.write(journal, (json.dumps([what, *operation]) + "\n").encode())

    def run(catalog: Catalog, operations: list[list[Any]]) -> None:
        for operation in operations:
            note("begin", operation)
            perform(catalog, *operation)
            note("done", operation)

    hook = KillAt(Failpoint(job["point"]), job["nth"])
    with Store(data, BASE, owner=True, failpoint=hook, busy_timeout_s=60) as store:
        threads = [
            threading.Thread(target=run, args=(store.catalog, operations))
            for operations in job["threads"]
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()


def main() -> None:
    """Answer every line of stdin."""
    for line in sys.stdin:
        child = os.fork()
        if child == 0:
            status = 1
            try:
                work(json.loads(line))
                status = 0
            finally:
                sys.stderr.flush()
                os._exit(status)
        _, status = os.waitpid(child, 0)
        print(status, flush=True)  # noqa: T201


if __name__ == "__main__":
    main()
