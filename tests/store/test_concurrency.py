"""Many threads at one door: right answers, exact quotas, nothing left over."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from gossamer.store.catalog.errors import (
    AdapterNotFound,
    CatalogError,
    CurrentVersion,
    NoEarlierVersion,
    QuotaExceeded,
)
from gossamer.store.catalog.views import StoreLimits
from gossamer.store.format import digest
from tests.store.support import (
    make_digest,
    make_file,
    opened,
    push,
    race,
    rows,
    stored_blobs,
    temp_files,
)

NAMES = ("sql", "math", "code")


def storm(seconds: float, *workers: Callable[[random.Random], None]) -> list[BaseException]:
    """Call each worker again and again in a thread of its own; returns what they raised."""
    raised: list[BaseException] = []
    end = time.monotonic() + seconds

    def run(worker: Callable[[random.Random], None], seed: int) -> None:
        randomness = random.Random(seed)  # noqa: S311
        while time.monotonic() < end and not raised:
            try:
                worker(randomness)
            except (AdapterNotFound, CurrentVersion, NoEarlierVersion):
                continue
            except BaseException as error:  # noqa: BLE001 - handed to the test
                raised.append(error)

    threads = [threading.Thread(target=run, args=(w, i)) for i, w in enumerate(workers)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return raised


def test_what_is_resolved_can_be_opened_whatever_others_do(tmp_path: Path) -> None:
    served: set[str] = set()
    with opened(tmp_path, busy_timeout_s=60) as store:
        catalog = store.catalog

        def upload(randomness: random.Random) -> None:
            push(catalog, randomness.choice(NAMES), randomness.randrange(6))

        def delete(randomness: random.Random) -> None:
            number = randomness.choice([None, 1, 2, 3, 4, 5])
            catalog.delete("acme", randomness.choice(NAMES), number)

        def rollback(randomness: random.Random) -> None:
            catalog.rollback("acme", randomness.choice(NAMES))

        def serve(randomness: random.Random) -> None:
            with catalog.resolve("acme", [randomness.choice(NAMES)]) as resolution:
                (version,) = resolution.versions
                time.sleep(randomness.random() * 0.01)
                try:
                    found = catalog.open(version.digest)
                except AdapterNotFound as error:  # held, so it must open
                    raise AssertionError(version) from error
                assert digest(found) == version.digest
                served.add(version.digest)

        def show(randomness: random.Random) -> None:
            for adapter in catalog.list("acme"):
                numbers = [v.number for v in adapter.versions]
                assert adapter.current is None or adapter.current in numbers
                assert len(numbers) == len(set(numbers))

        workers = (upload, upload, delete, rollback, serve, serve, serve, show)
        assert storm(4, *workers) == []
        assert len(catalog._holds) == 0
    assert served <= {make_digest(seed) for seed in range(6)}
    assert len(served) > 1
    with opened(tmp_path):
        needed = rows(tmp_path, "SELECT DISTINCT blob_id FROM versions WHERE status = 'active'")
        assert stored_blobs(tmp_path) == {blob_id for (blob_id,) in needed}
        assert temp_files(tmp_path) == []


def test_the_storm_reports_what_a_worker_raises() -> None:
    def fail(randomness: random.Random) -> None:
        raise ValueError(randomness.random())

    assert [type(e) for e in storm(1, fail)] == [ValueError]


def uploads(data: Path, limits: StoreLimits, names: list[str], seeds: list[int]) -> list[object]:
    """Upload all at once; returns each one's version or refusal."""
    with opened(data, limits=limits, busy_timeout_s=60) as store:
        barrier = threading.Barrier(len(names))

        def one(name: str, seed: int) -> object:
            file = make_file(seed)
            barrier.wait()
            try:
                return store.catalog.upload("acme", name, [file])
            except CatalogError as error:
                return error

        with ThreadPoolExecutor(len(names)) as pool:
            answers = list(pool.map(one, names, seeds))
        usage = store.catalog.usage("acme")
        assert usage.adapters <= limits.adapters
        assert usage.stored_bytes <= limits.stored_bytes
    return answers


def test_twenty_parallel_uploads_never_pass_the_number_of_adapters(tmp_path: Path) -> None:
    names = [f"adapter-{i}" for i in range(20)]
    answers = uploads(tmp_path, StoreLimits(adapters=7), names, list(range(20)))
    refused = [a for a in answers if isinstance(a, QuotaExceeded)]
    assert len(refused) == 13
    assert {(e.what, e.limit, e.wanted) for e in refused} == {("adapters", 7, 8)}
    assert len(stored_blobs(tmp_path)) == 7
    assert rows(tmp_path, "SELECT * FROM uploads") == []


def test_twenty_parallel_uploads_never_pass_the_bytes(tmp_path: Path) -> None:
    limit = sum(len(make_file(seed)) for seed in range(5)) + 800
    answers = uploads(tmp_path, StoreLimits(stored_bytes=limit), ["sql"] * 20, list(range(20)))
    refused = [a for a in answers if isinstance(a, QuotaExceeded)]
    assert 14 <= len(refused) <= 16  # the files differ by some bytes
    assert {(e.what, e.limit) for e in refused} == {("bytes", limit)}
    assert len(stored_blobs(tmp_path)) == 20 - len(refused)


def test_one_upload_sent_twenty_times_at_once_is_one_version(tmp_path: Path) -> None:
    answers = uploads(tmp_path, StoreLimits(), ["sql"] * 20, [1] * 20)
    assert len({repr(a) for a in answers}) == 1
    assert rows(tmp_path, "SELECT count(*) FROM versions") == [(1,)]
    assert len(stored_blobs(tmp_path)) == 1


UPLOAD = """
import sys
from pathlib import Path
from gossamer.store.catalog.opening import Store
from tests.store.support import BASE, make_file
files = [make_file(seed) for seed in range(8)]
with Store(Path(sys.argv[1]), BASE, busy_timeout_s=60) as store:
    print("ready", flush=True)
    input()
    for file in files:
        version = store.catalog.upload("acme", "sql", [file], activate=False)
        print(version.number, version.digest)
"""


def test_processes_share_a_registry(tmp_path: Path) -> None:
    with opened(tmp_path) as store:
        printed = race(UPLOAD, tmp_path, processes=3)
        given = {tuple(line.split()) for text in printed for line in text.splitlines()}
        versions = store.catalog.show("acme", "sql").versions
        assert {(str(v.number), v.digest) for v in versions} == given
        assert [v.number for v in versions] == list(range(1, len(versions) + 1))
        for version in versions:
            assert digest(store.catalog.open(version.digest)) == version.digest
