"""Many increments at once: their own thread, and a few places for each tenant."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest

from gossamer.store.catalog.door import Catalog
from gossamer.store.delta import DeltaSet
from tests.api.running import Running, running
from tests.api.test_increments import chain_for, push

INCREMENT = "/v1/adapters/b/content?increment=true"


@pytest.fixture
def api(api_base: Path, tmp_path: Path) -> Iterator[Running]:
    """A server whose queues nobody else is in."""
    with running(api_base, tmp_path) as server:
        yield server


class Slow:
    """Increments that wait for each other's end; `most` is how many were made at once."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.begun, self.may_end = threading.Semaphore(0), threading.Event()
        self.most = 0
        self._now = Counter[str]()
        self._lock = threading.Lock()
        self._parent = Catalog._parent

        def slowly(catalog: Catalog, tenant: str, digest: str) -> DeltaSet:
            return self._open(catalog, tenant, digest)

        monkeypatch.setattr(Catalog, "_parent", slowly)

    def _open(self, catalog: Catalog, tenant: str, digest: str) -> DeltaSet:
        with self._lock:
            self._now["made"] += 1
            self.most = max(self.most, self._now["made"])
        self.begun.release()
        try:
            assert self.may_end.wait(60)
            return self._parent(catalog, tenant, digest)
        finally:
            with self._lock:
                self._now["made"] -= 1


@contextmanager
def asking(api: Running, keys: list[str]) -> Iterator[list[httpx.Response]]:
    """An increment with each key, all at once; the replies, as they come."""
    replies: list[httpx.Response] = []

    def ask(key: str) -> None:
        with api.http(key) as http:
            replies.append(http.get(INCREMENT))

    threads = [threading.Thread(target=ask, args=[key]) for key in keys]
    for thread in threads:
        thread.start()
    try:
        yield replies
    finally:
        for thread in threads:
            thread.join()


def test_other_tenants_go_on(api: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    """Five of one tenant and two of two others: more than there are threads for files."""
    tenants = {name: api.new_key(name) for name in ("greedy", "second", "third", "other")}
    chain = chain_for(api, 41)
    for key in tenants.values():
        for name, adapter in zip("ab", chain, strict=False):
            push(api, key, name, adapter)
    slow = Slow(monkeypatch)
    greedy, second, third, other = tenants.values()
    with asking(api, [greedy] * 5 + [second] * 2 + [third] * 2) as replies:
        try:
            assert slow.begun.acquire(timeout=30)
            deadline = time.monotonic() + 30
            while len(replies) < 3 and time.monotonic() < deadline:
                time.sleep(0.02)
            time.sleep(0.2)  # for more to begin, if they could
            with api.http(other) as http:
                whole = http.get("/v1/adapters/b/content", timeout=10)
                assert whole.status_code == 200
                assert push(api, other, "c", chain[2])["version"] == 1
            with api.http(greedy) as http:  # and its own
                assert http.get("/v1/adapters/b/content", timeout=10).content == whole.content
        finally:
            slow.may_end.set()
    assert slow.most == 1
    statuses = Counter(reply.status_code for reply in replies)
    assert statuses == {200: 6, 429: 3}
    for reply in replies:
        if reply.status_code == 429:
            assert reply.json()["error"]["code"] == "rate_limit_exceeded"
            assert "2 increments of yours" in reply.json()["error"]["message"]
            assert int(reply.headers["retry-after"]) >= 1
    assert len({reply.content for reply in replies if reply.status_code == 200}) == 1


def test_a_place_is_given_back_when_the_file_is_sent_or_there_is_none(api: Running) -> None:
    key = api.new_key("again")
    first, second, _ = chain_for(api, 43)
    push(api, key, "a", first)
    with api.http(key) as http:
        for wanted in ("/v1/adapters/a/content?increment=true", INCREMENT):
            for _ in range(4):
                assert http.get(wanted).status_code == (409 if "/a/" in wanted else 404)
        push(api, key, "b", second)
        for _ in range(4):
            _settled(api)
            reply = http.get(INCREMENT)
            assert reply.status_code == 200
            assert reply.content
    _settled(api)


def _settled(api: Running) -> None:
    """The place goes after the last byte."""
    deadline = time.monotonic() + 10
    while api.services.admission._increments and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not api.services.admission._increments
