"""kill -9 at every failpoint of uploads and deletes, of adapters and of files: then the old state
is found, or the new one."""

from __future__ import annotations

import hashlib
import json
import random
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from gossamer.store.catalog.door import Catalog
from gossamer.store.catalog.errors import AdapterCorrupt, AdapterNotFound, FileCorrupt
from gossamer.store.failpoints import Failpoint
from gossamer.store.format import digest
from tests.store.crash_child import work
from tests.store.support import (
    FILE_DELETE_POINTS,
    FILE_UPLOAD_POINTS,
    IMPATIENT,
    blob_path,
    check_nothing_is_left_over,
    make_digest,
    make_file,
    opened,
    push,
    push_file,
    temp_files,
)
from tests.store.victims import KILLED, Victim

UPLOAD_POINTS = [p for p in Failpoint if p.startswith("upload.")]
DELETE_POINTS = [p for p in Failpoint if p.startswith("delete.")]
SEEDS = 12

#: the seeds of an adapter's versions, oldest first and the last one current; or of the files of one
#: name, oldest first
State = tuple[int, ...]


@pytest.fixture(scope="module")
def victim() -> Iterator[Victim]:
    with Victim(work) as victim:
        yield victim


@dataclass
class Journal:
    """What the workers were told, and so what must be found: one state per adapter, and per name of
    files, or one of two where an operation was under way."""

    states: dict[str, State] = field(default_factory=dict)
    open: dict[str, State] = field(default_factory=dict)

    def read(self, data: Path) -> None:
        """Take in a finished life's journal, and forget it."""
        path = data / "journal"
        for line in path.read_text().splitlines():
            what, kind, name, *seed = json.loads(line)
            after = self._after(kind, name, *seed)
            if what == "begin":
                self.open[name] = after
            else:
                self.states[name] = self.open.pop(name)
        path.unlink()

    def _after(self, kind: str, name: str, seed: int = 0) -> State:
        before = self.states.get(name, ())
        if kind == "put":
            return (*before, seed)
        if kind == "upload":
            return before if before and before[-1] == seed else (*before, seed)
        return before[1:] if kind == "drop" else ()

    def check(self, catalog: Catalog) -> None:
        """Compare with what is there; what was found counts from now on."""
        digests = {make_digest(seed): seed for seed in range(SEEDS)}
        found: dict[str, State] = {}
        for adapter in catalog.list("acme"):
            found[adapter.name] = tuple(digests[v.digest] for v in adapter.versions)
            assert adapter.versions[-1].current
            for version in adapter.versions:
                assert digest(catalog.open(version.digest)) == version.digest
        found |= find_files(catalog)
        for name in self.states.keys() | self.open.keys() | found.keys():
            old = self.states.get(name, ())
            assert found.get(name, ()) in (old, self.open.get(name, old)), name
        self.states, self.open = found, {}


def find_files(catalog: Catalog) -> dict[str, State]:
    """The files of each name, by their seeds, every byte read."""
    seeds = {hashlib.sha256(make_file(seed)).hexdigest(): seed for seed in range(SEEDS)}
    found: dict[str, State] = {}
    for file in catalog.files.list("acme", order="asc").items:
        with catalog.files.content("acme", file.id) as path:
            seed = seeds[hashlib.sha256(path.read_bytes()).hexdigest()]
        found[file.filename] = (*found.get(file.filename, ()), seed)
    return found


def prepare(data: Path) -> None:
    with opened(data) as store:
        push(store.catalog, "keep", 0)
        push(store.catalog, "sql", 1)


@pytest.mark.parametrize("point", UPLOAD_POINTS)
def test_killed_during_an_upload(tmp_path: Path, victim: Victim, point: Failpoint) -> None:
    prepare(tmp_path)
    assert victim.run(tmp_path, point, 1, [["upload", "sql", 2]]) == KILLED
    with opened(tmp_path) as store:
        assert temp_files(tmp_path) == []
        current = store.catalog.show("acme", "sql").current
        assert current == (2 if point is Failpoint.UPLOAD_REGISTERED else 1)
        for seed in (0, current):
            assert digest(store.catalog.open(make_digest(seed))) == make_digest(seed)
        assert push(store.catalog, "sql", 2).number == 2
    with opened(tmp_path, limits=IMPATIENT) as store:
        check_nothing_is_left_over(tmp_path)
        assert digest(store.catalog.open(make_digest(2))) == make_digest(2)


@pytest.mark.parametrize("point", DELETE_POINTS)
def test_killed_during_a_delete(tmp_path: Path, victim: Victim, point: Failpoint) -> None:
    prepare(tmp_path)
    assert victim.run(tmp_path, point, 1, [["delete", "sql"]]) == KILLED
    with opened(tmp_path) as store:
        if point is Failpoint.DELETE_TOMBSTONING:
            assert digest(store.catalog.open(make_digest(1))) == make_digest(1)
        else:
            with pytest.raises(AdapterNotFound):
                store.catalog.resolve("acme", ["sql"])
        assert digest(store.catalog.open(make_digest(0))) == make_digest(0)
        check_nothing_is_left_over(tmp_path)


@pytest.mark.parametrize("point", FILE_UPLOAD_POINTS)
def test_killed_during_the_upload_of_a_file(
    tmp_path: Path, victim: Victim, point: Failpoint
) -> None:
    prepare(tmp_path)
    assert victim.run(tmp_path, point, 1, [["put", "data.jsonl", 2]]) == KILLED
    with opened(tmp_path) as store:
        assert temp_files(tmp_path) == []
        done = point is Failpoint.FILE_REGISTERED
        assert find_files(store.catalog) == ({"data.jsonl": (2,)} if done else {})
        push_file(store.files, "data.jsonl", make_file(2))
    with opened(tmp_path, limits=IMPATIENT) as store:
        check_nothing_is_left_over(tmp_path)
        assert find_files(store.catalog) == {"data.jsonl": (2, 2) if done else (2,)}


@pytest.mark.parametrize("point", FILE_DELETE_POINTS)
@pytest.mark.parametrize("shared", [False, True], ids=["alone", "shared"])
def test_killed_during_the_delete_of_a_file(
    tmp_path: Path, victim: Victim, point: Failpoint, shared: bool
) -> None:
    prepare(tmp_path)
    with opened(tmp_path) as store:
        push_file(store.files, "data.jsonl", make_file(1 if shared else 2))
    # An adapter of the same bytes keeps the blob, and nobody comes to unlink it.
    dies = not shared or point.startswith("file.")
    assert victim.run(tmp_path, point, 1, [["drop", "data.jsonl"]]) == (KILLED if dies else 0)
    with opened(tmp_path) as store:
        kept = point is Failpoint.FILE_TOMBSTONING
        assert find_files(store.catalog).keys() == ({"data.jsonl"} if kept else set())
        for seed in (0, 1):
            assert digest(store.catalog.open(make_digest(seed))) == make_digest(seed)
        check_nothing_is_left_over(tmp_path)


@pytest.mark.parametrize("point", DELETE_POINTS)
def test_killed_during_the_delete_of_an_adapter_whose_bytes_a_file_has(
    tmp_path: Path, victim: Victim, point: Failpoint
) -> None:
    prepare(tmp_path)
    with opened(tmp_path) as store:
        push_file(store.files, "data.jsonl", make_file(1))
    dies = point in (Failpoint.DELETE_TOMBSTONING, Failpoint.DELETE_TOMBSTONED)
    assert victim.run(tmp_path, point, 1, [["delete", "sql"]]) == (KILLED if dies else 0)
    with opened(tmp_path) as store:
        assert find_files(store.catalog) == {"data.jsonl": (1,)}
        check_nothing_is_left_over(tmp_path)


def test_nobody_dies_where_nobody_passes(tmp_path: Path, victim: Victim) -> None:
    prepare(tmp_path)
    assert victim.run(tmp_path, Failpoint.DELETE_CLAIMED, 1, [["upload", "sql", 2]]) == 0
    with opened(tmp_path) as store:
        assert store.catalog.show("acme", "sql").current == 2


def life(randomness: random.Random, threads: int) -> list[list[list[Any]]]:
    """What every worker does until the end: each has adapters and files of its own, and all share
    the blobs."""

    def operation(thread: int) -> list[Any]:
        kind = randomness.choices(["upload", "delete", "put", "drop"], [4, 2, 4, 2])[0]
        thing = "adapter" if kind in ("upload", "delete") else "file"
        name = f"{thing}-{thread}-{randomness.randrange(2)}"
        seed = [randomness.randrange(SEEDS)] if kind in ("upload", "put") else []
        return [kind, name, *seed]

    return [[operation(t) for _ in range(12)] for t in range(threads)]


def crash_again_and_again(data: Path, victim: Victim, lives: int, seed: int) -> int:
    """Kill concurrent uploads and deletes at random points of one folder; returns how many died."""
    randomness = random.Random(seed)  # noqa: S311
    journal, killed = Journal(), 0
    with opened(data):
        pass
    for _ in range(lives):
        point = randomness.choice(list(Failpoint))
        nth = randomness.randrange(1, 25)
        status = victim.run(data, point, nth, *life(randomness, 4))
        assert status in (0, KILLED)
        killed += status == KILLED
        journal.read(data)
        start = time.monotonic()
        with opened(data, limits=IMPATIENT) as store:
            assert time.monotonic() - start < 10
            journal.check(store.catalog)
            check_nothing_is_left_over(data)
    return killed


def test_killed_under_concurrent_load(tmp_path: Path, victim: Victim) -> None:
    assert crash_again_and_again(tmp_path, victim, 4, seed=3) > 0


@pytest.mark.gate
@pytest.mark.timeout(1200)
def test_killed_fifty_times_under_concurrent_load(tmp_path: Path, victim: Victim) -> None:
    lives = killed = 0
    while killed < 50:
        lives += 1
        killed += crash_again_and_again(tmp_path / str(lives), victim, 5, seed=lives)


def test_the_checks_notice_a_lost_write_and_a_lost_blob(tmp_path: Path, victim: Victim) -> None:
    with opened(tmp_path):
        pass
    operations = [["upload", "a", 1], ["put", "f", 2]]
    assert victim.run(tmp_path, Failpoint.DELETE_CLAIMED, 1, operations) == 0
    journal = Journal()
    journal.read(tmp_path)
    with opened(tmp_path) as store:
        journal.check(store.catalog)
        journal.states["b"] = (2,)  # acknowledged, but not there
        with pytest.raises(AssertionError):
            journal.check(store.catalog)
        journal.states = {"a": (1,), "f": (2,), "g": (3,)}
        with pytest.raises(AssertionError, match="g"):
            journal.check(store.catalog)
        journal.states = {"a": (1,), "f": (2,)}
        for seed, error in ((2, FileCorrupt), (1, AdapterCorrupt)):
            blob_path(tmp_path, hashlib.sha256(make_file(seed)).hexdigest()).unlink()
            with pytest.raises(AssertionError):
                check_nothing_is_left_over(tmp_path)
            with pytest.raises(error):
                journal.check(store.catalog)
