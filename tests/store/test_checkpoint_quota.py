"""Checkpoints and the quota: their bytes count, and must leave room for a result; a checkpoint may
take the place of others."""

from __future__ import annotations

from pathlib import Path

import pytest

from gossamer.store.catalog.door import Catalog
from gossamer.store.catalog.errors import AdapterNotFound, QuotaExceeded
from gossamer.store.catalog.opening import Store
from gossamer.store.catalog.views import StoreLimits, Usage
from tests.store.support import make_digest, make_file, meaning, opened, push, rows, stored_blobs


def test_the_quota_counts_what_is_kept(store: Store) -> None:
    sizes = [len(make_file(seed)) for seed in range(4)]
    catalog = store.catalog
    push(catalog, "sql", 1)
    push(catalog, "copy", 1)  # the same file counts once
    push(catalog, "sql", 2, tag="step-1")  # a checkpoint with its bytes alone
    push(catalog, "training", 3, tag="step-1")
    push(catalog, "training", 1, tag="step-2")
    push(catalog, "sql", 4, tenant="zeta")  # another tenant's not at all
    assert catalog.usage("acme") == Usage(2, sum(sizes[1:4]))
    catalog.delete("acme", "training")
    assert catalog.usage("acme") == Usage(2, sizes[1] + sizes[2])
    catalog.delete("acme", "copy")
    catalog.delete("acme", "sql")
    assert catalog.usage("acme") == Usage(0, 0)


def test_a_full_quota_still_takes_what_costs_nothing(tmp_path: Path) -> None:
    size = len(make_file(1))
    with opened(tmp_path, limits=StoreLimits(adapters=1, stored_bytes=2 * size)) as store:
        first = push(store.catalog, "sql", 1)
        assert push(store.catalog, "sql", 1) == first
        made = push(store.catalog, "other", 1, tag="step-1")  # no adapter, and no more bytes
        assert push(store.catalog, "other", 1, tag="step-1") == made
        assert store.catalog.usage("acme") == Usage(1, size)


@pytest.mark.parametrize(("spare", "fits"), [(0, True), (-1, False)])
def test_room_for_another_of_its_size_must_be_left(spare: int, fits: bool, tmp_path: Path) -> None:
    limits = StoreLimits(stored_bytes=len(make_file(1)) + 2 * len(make_file(2)) + spare)
    with opened(tmp_path, limits=limits) as store:
        push(store.catalog, "sql", 1)
        before = stored_blobs(tmp_path)
        if fits:
            assert push(store.catalog, "sql", 2, tag="step-1").tag == "step-1"
            return
        with pytest.raises(QuotaExceeded) as caught:
            push(store.catalog, "sql", 2, tag="step-1")
        assert caught.value.wanted == limits.stored_bytes + 1
        assert stored_blobs(tmp_path) == before
        assert rows(tmp_path, "SELECT * FROM uploads") == []
        push(store.catalog, "sql", 2)  # a result needs its own room only


def test_others_go_in_the_transaction_in_which_one_appears(
    catalog: Catalog, tmp_path: Path
) -> None:
    for step in (1, 2, 3):
        push(catalog, "sql", step, tag=f"step-{step}")
    push(catalog, "math", 1, tag="step-1")
    push(catalog, "sql", 4, tag="step-4", outdated=lambda _: ["step-1", "step-2", "step-9"])
    assert [v.tag for v in catalog.show("acme", "sql").versions] == ["step-3", "step-4"]
    assert meaning(catalog, "math@step-1") == make_digest(1)
    with pytest.raises(AdapterNotFound):
        meaning(catalog, "sql@step-2")
    # What another name needs stays, the rest is gone at once.
    wanted = {v.blob_id for a in catalog.list("acme") for v in a.versions}
    assert stored_blobs(tmp_path) == wanted


def test_a_version_is_not_taken_for_a_checkpoint_that_says_the_same(catalog: Catalog) -> None:
    push(catalog, "sql", 1, tag="step-1")
    result = push(catalog, "sql", 1)
    assert (result.label, result.current) == ("sql:1", True)
    assert meaning(catalog, "sql") == make_digest(1)
