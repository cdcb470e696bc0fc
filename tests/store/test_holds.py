"""Counts of holds, and the handshake between who holds and who unlinks."""

from __future__ import annotations

import pytest

from gossamer.store.catalog.holds import Held, Holds

A, B = Held("sha256:a", "blob-1"), Held("sha256:b", "blob-2")
A2 = Held("sha256:a", "blob-2")  # the digest of A in another file


def test_a_held_blob_is_not_claimed_until_the_last_hold_ends() -> None:
    holds = Holds()
    assert holds.take([A, B], holds.generation())
    assert holds.take([A], holds.generation())
    assert not holds.claim("blob-1")
    assert holds.give_back([A]) == []
    assert not holds.claim("blob-1")
    assert holds.give_back([A]) == ["blob-1"]
    assert holds.claim("blob-1")
    assert len(holds) == 1
    holds.check_integrity()


def test_a_blob_that_nobody_wanted_to_unlink_is_not_named() -> None:
    holds = Holds()
    holds.take([A], holds.generation())
    assert holds.give_back([A]) == []


def test_a_doomed_blob_is_named_once_only() -> None:
    holds = Holds()
    holds.take([A, A2], holds.generation())
    assert not holds.claim("blob-1")
    assert holds.give_back([A]) == ["blob-1"]
    assert holds.take([A], holds.generation())
    assert holds.give_back([A, A2]) == []


def test_a_hold_from_before_an_unlink_is_refused() -> None:
    holds = Holds()
    before = holds.generation()
    assert holds.claim("blob-1")
    assert not holds.take([A], before)
    assert len(holds) == 0
    assert holds.take([A], holds.generation())


def test_a_refused_claim_disturbs_no_reader() -> None:
    holds = Holds()
    holds.take([A], holds.generation())
    before = holds.generation()
    assert not holds.claim("blob-1")
    assert holds.take([B], before)


def test_the_blob_of_a_held_digest_is_known() -> None:
    holds = Holds()
    assert holds.blob_of("sha256:a") is None
    holds.take([A], holds.generation())
    assert holds.blob_of("sha256:a") == "blob-1"
    holds.give_back([A])
    assert holds.blob_of("sha256:a") is None


def test_the_check_notices_counts_that_disagree() -> None:
    holds = Holds()
    holds.take([A], holds.generation())
    holds._blobs["blob-1"] += 1
    with pytest.raises(RuntimeError, match="disagree"):
        holds.check_integrity()
