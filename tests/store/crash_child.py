"""What the victim of the crash tests does in one life: several workers at one store.

Each has a list of operations: ["upload", name, seed] and ["delete", name] of adapters, and
["put", name, seed] and ["drop", name] of files: the latter drops the oldest one.

What a worker is about to do and what was acknowledged to it goes to `journal` in the data folder,
one line each, by single writes that outlive the process.
"""

from __future__ import annotations

import contextlib
import json
import os
import threading
from pathlib import Path
from typing import Any

from gossamer.store.catalog.door import Catalog
from gossamer.store.catalog.errors import AdapterNotFound
from gossamer.store.catalog.opening import Store
from gossamer.store.failpoints import Hook
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


def work(data: Path, hook: Hook, *workers: list[list[Any]]) -> int:
    """Do every worker's operations, each in a thread of its own."""
    journal = os.open(data / "journal", os.O_WRONLY | os.O_APPEND | os.O_CREAT)

    def note(what: str, operation: list[Any]) -> None:
        os.write(journal, (json.dumps([what, *operation]) + "\n").encode())

    def run(catalog: Catalog, operations: list[list[Any]]) -> None:
        for operation in operations:
            note("begin", operation)
            perform(catalog, *operation)
            note("done", operation)

    with Store(data, BASE, owner=True, failpoint=hook, busy_timeout_s=60) as store:
        threads = [
            threading.Thread(target=run, args=(store.catalog, operations)) for operations in workers
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    return 0
