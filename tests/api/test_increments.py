"""What a link of a chain adds to its parents: computed, downloaded, and added to them again."""

from __future__ import annotations

import hashlib
import io
import threading
import time
import weakref
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from gossamer.store.catalog.door import Catalog
from gossamer.store.chains import Parent, increment, parents_of, support_digest
from gossamer.store.delta import Delta, DeltaSet
from gossamer.store.errors import ChainError
from gossamer.store.format import digest, read, write
from gossamer.store.values import ValueDtype
from gossamer.training.starting import chained
from tests.api.running import Running

Table = dict[str, tuple[int, int]]


def link(table: Table, parents: Sequence[DeltaSet], seed: int, base: str = "") -> DeltaSet:
    """The next link of a chain: its parents' entries, and random ones beside them.

    Weights without entries of the parents, without own ones, of either dtype and with a scale are
    among them.
    """
    random = np.random.default_rng(seed)
    chain = chained([(str(i), parent) for i, parent in enumerate(parents)])
    deltas = {}
    for name, shape in table.items():
        size = shape[0] * shape[1]
        dtype: ValueDtype = "BF16" if random.random() < 0.5 else "F32"
        taken: NDArray[np.int64] = np.empty(0, np.int64)
        values: NDArray[np.float32] = np.empty(0, np.float32)
        if name in chain.entries:
            entries = chain.entries[name]
            taken, values, dtype = entries.positions.numpy(), entries.values.numpy(), "F32"
        free = np.setdiff1d(np.arange(size), taken)
        own = random.choice(free, int(random.integers(0, 1 + size // 20)), replace=False)
        drawn = random.normal(size=len(own)).astype(np.float32)
        positions = np.concatenate([taken, own])
        order = np.argsort(positions)
        everything = np.concatenate([values, drawn])[order]
        if len(positions):
            deltas[name] = Delta.element(shape, positions[order], everything, value_dtype=dtype)
    record = {"chain": chain.record()} if parents else {}
    return DeltaSet(base, "", deltas, record)


def three(table: Table, seed: int, base: str = "") -> list[DeltaSet]:
    """A chain of three links, the third of both others."""
    first = link(table, [], seed, base)
    second = link(table, [first], seed + 1, base)
    return [first, second, link(table, [second], seed + 2, base)]


def joined(parts: Sequence[DeltaSet], child: DeltaSet) -> DeltaSet:
    """The union of adapters that share nothing, in the child's dtypes and with its record."""
    deltas = {}
    for name in {name for part in parts for name in part.deltas}:
        found = [part.deltas[name].elements() for part in parts if name in part.deltas]
        where = np.concatenate([positions for positions, _ in found])
        order = np.argsort(where)
        values = np.concatenate([values for _, values in found])[order]
        assert len(np.unique(where)) == len(where), "an entry that two of them have"
        dtype = child.deltas[name].value_dtype
        shape = child.deltas[name].shape
        deltas[name] = Delta.element(shape, where[order], values, value_dtype=dtype)
    return replace(child, deltas=deltas)


def increment_of(child: DeltaSet, *parents: DeltaSet) -> DeltaSet:
    return increment(child, zip(parents_of(child.record), parents, strict=True))


SMALL: Table = {"a": (40, 30), "b": (7, 200), "c": (1, 20), "d": (64, 64)}


@pytest.mark.parametrize("seed", range(0, 60, 3))
def test_the_increment_and_the_parents_are_the_child(seed: int) -> None:
    first, second, third = three(SMALL, seed)
    for child, parent in ((second, first), (third, second)):
        made = increment_of(child, parent)
        assert made.nnz == child.nnz - parent.nnz > 0
        assert digest(joined([parent, made], child)) == digest(child)
        file = io.BytesIO()
        write(made, file)
        assert digest(read(io.BytesIO(file.getvalue()))) == digest(made)
        assert made.record["increment"]["of"] == digest(child)
        named = made.record["increment"]["parents"]
        assert [p["digest"] for p in named] == [digest(parent)]
    # Of the whole chain: the links' increments beside its first.
    steps = [first, increment_of(second, first), increment_of(third, second)]
    assert digest(joined(steps, third)) == digest(third)


def test_of_two_parents_and_of_tiles() -> None:
    random = np.random.default_rng(7)
    shape, half = (32, 40), np.arange(0, 20, 3)
    tiles = random.normal(size=(len(half), 8, 8)).astype(np.float32)
    one = DeltaSet("", "", {"w": Delta.block(shape, 8, half[:4], tiles[:4], value_dtype="BF16")})
    two = DeltaSet("", "", {"w": Delta.block(shape, 8, half[4:], tiles[4:], value_dtype="BF16")})
    more = random.normal(size=(20, 8, 8)).astype(np.float32)
    more[half] = tiles
    for scale in (1.0, 0.3):
        parents = [
            replace(p, deltas={"w": replace(p.deltas["w"], scale=scale)}) for p in (one, two)
        ]
        record = {"chain": chained(list(zip("ab", parents, strict=True))).record()}
        whole = Delta.block(shape, 8, np.arange(20), more, value_dtype="BF16", scale=scale)
        child = DeltaSet("", "", {"w": whole}, record)
        made = increment_of(child, *parents)
        assert made.deltas["w"].kind == "element"
        everything = joined([*parents, made], made)
        exact = [part.deltas["w"].elements()[1] for part in (everything, child)]
        if scale == 1.0:
            np.testing.assert_array_equal(exact[0].view(np.uint32), exact[1].view(np.uint32))
        own = made.deltas["w"].elements()
        where, values = child.deltas["w"].elements()
        np.testing.assert_array_equal(own[1], values[np.searchsorted(where, own[0])])


def test_a_support_has_the_digest_that_training_records() -> None:
    first, second, _ = three(SMALL, 1)
    (named,) = parents_of(second.record)
    assert (named.digest, named.support) == (digest(first), support_digest(first))
    assert support_digest(second) != named.support


def changed(delta_set: DeltaSet, name: str, **fields: Any) -> DeltaSet:
    return replace(
        delta_set, deltas={**delta_set.deltas, name: replace(delta_set.deltas[name], **fields)}
    )


def test_what_is_no_chain_is_refused() -> None:
    first, second, third = three(SMALL, 5)
    with pytest.raises(ChainError, match="names no parents"):
        parents_of(first.record)
    with pytest.raises(ChainError, match="other entries"):
        increment_of(second, third)
    name = next(name for name, delta in first.deltas.items() if delta.nnz > 2)
    held = second.deltas[name]
    at = int(np.flatnonzero(np.isin(held.positions, first.deltas[name].positions))[1])
    off = held.values.copy()
    off[at] = np.nextafter(off[at], np.float32(9))
    for wrong in (
        changed(second, name, values=off),
        changed(
            second, name,
            positions=np.delete(held.positions, at), values=np.delete(held.values, at),
        ),
        replace(second, deltas={k: v for k, v in second.deltas.items() if k != name}),
    ):  # fmt: skip
        with pytest.raises(ChainError, match="does not hold its parent"):
            increment_of(wrong, first)
    with pytest.raises(ChainError, match="adds nothing"):
        increment_of(replace(first, record=second.record), first)


@pytest.mark.parametrize(
    "chain",
    [
        None, [], {}, "x", [1], [{}], [{"digest": "sha256:1", "support": "sha256:2"}],
        [{"digest": "sha256:" + "0" * 64}], [{"digest": 5, "support": []}],
        [{"digest": "sha256:" + "0" * 64, "support": "sha256:" + "1" * 64}] * 17,
    ],
)  # fmt: skip
def test_a_record_is_not_trusted(chain: Any) -> None:
    with pytest.raises(ChainError):
        parents_of({"chain": chain})


def test_a_parent_that_is_named_twice_is_refused() -> None:
    """Each naming would be another decoding of it."""
    chain = [{"digest": f"sha256:{i:064x}", "support": f"sha256:{0:064x}"} for i in range(16)]
    assert len(parents_of({"chain": chain})) == 16
    with pytest.raises(ChainError, match="more than once"):
        parents_of({"chain": [*chain[:15], {**chain[3], "support": f"sha256:{1:064x}"}]})


def test_one_parent_is_in_memory_at_a_time() -> None:
    first, second, third = three(SMALL, 3)
    supports = [{"digest": digest(p), "support": support_digest(p)} for p in (first, second)]
    record = {"chain": supports}
    opened: list[weakref.ref[DeltaSet]] = []

    def opening() -> Iterator[tuple[Parent, DeltaSet]]:
        for parent, delta_set in zip(parents_of(record), (first, second), strict=True):
            assert [one() for one in opened] == [None] * len(opened)
            copy = replace(delta_set)
            opened.append(weakref.ref(copy))
            yield parent, copy
            del copy

    made = increment(replace(third, record=record), opening())
    assert made.nnz == third.nnz - second.nnz
    assert [one() for one in opened] == [None, None]


# -- over HTTP


@pytest.fixture
def tenant(api: Running, request: pytest.FixtureRequest) -> str:
    """The key of a tenant that nobody else uses."""
    return api.new_key(hashlib.sha256(request.node.nodeid.encode()).hexdigest())


def push(api: Running, key: str, name: str, adapter: DeltaSet) -> dict[str, Any]:
    file = io.BytesIO()
    write(adapter, file)
    with api.http(key) as http:
        reply = http.post(
            f"/v1/adapters?name={name}",
            content=file.getvalue(),
            headers={"content-type": "application/octet-stream"},
        )
    assert reply.status_code == 201, reply.text
    version: dict[str, Any] = reply.json()
    return version


def chain_for(api: Running, seed: int) -> list[DeltaSet]:
    base = api.services.base
    return three(dict(api.services.engine.table), seed, base.fingerprint)


def spooled(api: Running) -> list[Path]:
    """Temporary files of the store. They go after the last byte of a reply, so wait for it."""
    with api.services.catalog.spool() as mine:
        where = mine.path.parent
    deadline = time.monotonic() + 10
    while (found := list(where.iterdir())) and time.monotonic() < deadline:
        time.sleep(0.02)
    return found


def test_the_increment_comes_as_a_file_of_its_own(api: Running, tenant: str) -> None:
    chain = chain_for(api, 11)
    for name, adapter in zip("abc", chain, strict=True):
        push(api, tenant, name, adapter)
    with api.http(tenant) as http:
        whole = http.get("/v1/adapters/c/content")
        again = http.get("/v1/adapters/c/content?increment=false")
        reply = http.get("/v1/adapters/c/content?increment=true")
        repeated = http.get("/v1/adapters/c:1/content?increment=true")
    assert whole.content == again.content != reply.content == repeated.content
    assert reply.status_code == 200
    assert reply.headers["etag"] == f'"{hashlib.sha256(reply.content).hexdigest()}"'
    assert 'filename="c.increment.safetensors"' in reply.headers["content-disposition"]
    made = read(io.BytesIO(reply.content))
    assert reply.headers["x-gossamer-digest"] == digest(made)
    assert made.record["increment"]["of"] == whole.headers["x-gossamer-digest"]
    assert digest(joined([chain[1], made], chain[2])) == digest(chain[2])
    assert len(reply.content) < len(whole.content)

    # It is an adapter: pushed and mixed with its parents it answers as the child does.
    push(api, tenant, "d", made)
    client = api.client(tenant)

    def text(model: str) -> str:
        extra = {"ignore_eos": True}
        return (
            client.completions.create(
                model=model, prompt="Two adapters", temperature=0, max_tokens=12, extra_body=extra
            )
            .choices[0]
            .text
        )

    assert text("b*1+d*1") == text("c") != text("b")
    assert not spooled(api), "the file was temporary"


def test_what_has_no_increment_is_a_409_that_says_why(api: Running, tenant: str) -> None:
    a, b, c = chain_for(api, 21)

    def refused(name: str) -> str:
        with api.http(tenant) as http:
            reply = http.get(f"/v1/adapters/{name}/content?increment=true")
        error = reply.json()["error"]
        assert (reply.status_code, error["code"], error["param"]) == (
            409, "no_increment", "increment",
        ), reply.text  # fmt: skip
        assert reply.headers["x-should-retry"] == "false"
        return str(error["message"])

    push(api, tenant, "a", a)
    assert "names no parents" in refused("a")
    push(api, tenant, "c", c)
    assert digest(b) in refused("c")  # its parent was never there
    stranger = api.new_key("stranger-with-the-parent")
    push(api, stranger, "b", b)
    assert digest(b) in refused("c"), "another tenant's is not there"
    push(api, tenant, "elsewhere", b)
    with api.http(tenant) as http:
        assert http.get("/v1/adapters/c/content?increment=true").status_code == 200
        assert http.delete("/v1/adapters/elsewhere").status_code == 200
    assert "not among your adapters" in refused("c")
    lying = replace(b, record={"chain": c.record["chain"]})
    push(api, tenant, "a", lying)  # b again, that names itself
    assert "adds nothing" in refused("a:2")
    # A stranger's file of the same digest has another record, which is not ours.
    push(api, stranger, "honest", b)
    wrong = [{**c.record["chain"][0], "support": "sha256:" + "0" * 64}]
    push(api, tenant, "w", replace(b, record={"chain": wrong}))
    assert "other entries" in refused("w")
    assert not spooled(api)


@pytest.mark.parametrize(
    ("query", "param"),
    [("increment=maybe", "increment"), ("increment=", "increment"), ("whole=1", "whole")],
)
def test_another_query_is_a_400(api: Running, query: str, param: str) -> None:
    with api.http() as http:
        reply = http.get(f"/v1/adapters/sql/content?{query}")
    assert (reply.status_code, reply.json()["error"]["param"]) == (400, param)


def test_what_is_missing_or_anothers_is_a_404(api: Running, tenant: str) -> None:
    with api.http(tenant) as http:
        for name in ("nothing", "sql", "default/sql", "a@sha256:" + "0" * 64, "%00"):
            reply = http.get(f"/v1/adapters/{name}/content?increment=true")
            assert (reply.status_code, reply.json()["error"]["code"]) == (404, "model_not_found")


def test_the_event_loop_goes_on_meanwhile(
    api: Running, tenant: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Other requests are answered while an increment is being computed."""
    for name, adapter in zip("abc", chain_for(api, 31), strict=True):
        push(api, tenant, name, adapter)
    working, may_end = threading.Event(), threading.Event()
    parent = Catalog._parent

    def slow(self: Catalog, *args: str) -> DeltaSet:
        working.set()
        assert may_end.wait(30)
        return parent(self, *args)

    monkeypatch.setattr(Catalog, "_parent", slow)
    replies = []

    def ask() -> None:
        with api.http(tenant) as http:
            replies.append(http.get("/v1/adapters/c/content?increment=true").status_code)

    thread = threading.Thread(target=ask)
    thread.start()
    try:
        assert working.wait(30)
        with api.http(tenant) as http:
            assert http.get("/v1/adapters").status_code == 200
        assert not replies
    finally:
        may_end.set()
        thread.join()
    assert replies == [200]
