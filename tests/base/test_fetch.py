"""One file from a package index, whatever the network does to it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from gossamer.base.errors import ChecksumMismatchError, DownloadError, IndexUnavailableError
from gossamer.base.fetch import Stage, fetch, sha256_of
from tests.base.index_server import IndexServer

CONTENT = np.random.default_rng(0).bytes(1_000_000)
NAME = "thing-1.0-py3-none-any.whl"


@pytest.fixture
def index() -> Iterator[IndexServer]:
    with IndexServer("thing", NAME, CONTENT) as server:
        yield server


def get(index: IndexServer, folder: Path, attempts: int = 3) -> Path:
    return fetch(index.pin, folder, index_url=index.url, attempts=attempts, backoff_s=0.0)


def part(folder: Path) -> Path:
    return folder / f"{NAME}.part"


def test_a_file_arrives_whole_and_progress_counts_its_bytes(
    index: IndexServer, tmp_path: Path
) -> None:
    seen: list[tuple[Stage, int, int]] = []
    path = fetch(
        index.pin, tmp_path, index_url=index.url, progress=lambda *event: seen.append(event)
    )
    assert path.read_bytes() == CONTENT
    assert not part(tmp_path).exists()
    assert seen[0] == ("download", 0, len(CONTENT))
    assert seen[-1] == ("download", len(CONTENT), len(CONTENT))
    assert [done for _, done, _ in seen] == sorted(done for _, done, _ in seen)


def test_a_verified_file_is_used_again_without_the_network(
    index: IndexServer, tmp_path: Path
) -> None:
    get(index, tmp_path)
    fetch(index.pin, tmp_path, index_url="http://127.0.0.1:9/simple/")
    assert len(index.transfers) == 1


def test_a_damaged_finished_file_is_fetched_again(index: IndexServer, tmp_path: Path) -> None:
    (tmp_path / NAME).write_bytes(CONTENT[:-1] + b"?")
    assert get(index, tmp_path).read_bytes() == CONTENT


def test_what_an_earlier_process_left_is_continued(index: IndexServer, tmp_path: Path) -> None:
    part(tmp_path).write_bytes(CONTENT[:400_000])
    assert get(index, tmp_path).read_bytes() == CONTENT
    assert index.transfers == ["bytes=400000-"]


def test_a_complete_part_needs_no_transfer(index: IndexServer, tmp_path: Path) -> None:
    part(tmp_path).write_bytes(CONTENT)
    assert get(index, tmp_path).read_bytes() == CONTENT
    assert index.transfers == []


def test_a_server_that_ignores_ranges_starts_over(index: IndexServer, tmp_path: Path) -> None:
    index.ranges = False
    part(tmp_path).write_bytes(CONTENT[:400_000])
    assert get(index, tmp_path).read_bytes() == CONTENT


def test_dropped_connections_are_taken_up_where_they_broke(
    index: IndexServer, tmp_path: Path
) -> None:
    # more drops than attempts: each brought something, so the count starts again
    index.cuts = [300_000, 300_000, 100_000, 0, 200_000]
    assert get(index, tmp_path, attempts=2).read_bytes() == CONTENT
    assert index.transfers == [None, *(f"bytes={n}00000-" for n in (3, 6, 7, 7, 9))]


def test_a_transfer_that_brings_nothing_is_given_up_and_kept(
    index: IndexServer, tmp_path: Path
) -> None:
    index.cuts = [300_000, 0, 0, 0]
    with pytest.raises(DownloadError) as error:
        get(index, tmp_path)
    assert (error.value.received, error.value.size) == (300_000, len(CONTENT))
    assert part(tmp_path).read_bytes() == CONTENT[:300_000]
    assert get(index, tmp_path).read_bytes() == CONTENT


def test_a_part_of_other_bytes_is_fetched_once_more_from_the_start(
    index: IndexServer, tmp_path: Path
) -> None:
    part(tmp_path).write_bytes(bytes(400_000))  # what a power cut can leave
    assert get(index, tmp_path).read_bytes() == CONTENT
    assert index.transfers == ["bytes=400000-", None]


def test_a_part_that_is_too_long_is_discarded(index: IndexServer, tmp_path: Path) -> None:
    part(tmp_path).write_bytes(bytes(len(CONTENT) + 1))
    assert get(index, tmp_path).read_bytes() == CONTENT


def test_other_bytes_than_the_pinned_are_refused_and_leave_nothing(
    index: IndexServer, tmp_path: Path
) -> None:
    index.sent = CONTENT[:-1] + bytes([CONTENT[-1] ^ 1])
    with pytest.raises(ChecksumMismatchError) as error:
        get(index, tmp_path)
    assert error.value.expected == index.pin.sha256
    assert error.value.actual != error.value.expected
    assert list(tmp_path.iterdir()) == []


def test_more_bytes_than_the_pinned_size_are_not_collected(
    index: IndexServer, tmp_path: Path
) -> None:
    index.sent = CONTENT + bytes(10_000_000)
    with pytest.raises(DownloadError, match="more than the file has"):
        get(index, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_an_index_that_declares_another_file_is_refused_before_the_transfer(
    index: IndexServer, tmp_path: Path
) -> None:
    index.declared = "0" * 64
    with pytest.raises(ChecksumMismatchError):
        get(index, tmp_path)
    assert index.transfers == []


def test_an_index_that_declares_no_hash_is_checked_by_the_pin(
    index: IndexServer, tmp_path: Path
) -> None:
    index.declared = None
    assert sha256_of(get(index, tmp_path)) == index.pin.sha256


def test_an_index_without_json_is_named(index: IndexServer, tmp_path: Path) -> None:
    index.html = True
    with pytest.raises(IndexUnavailableError, match="not in the JSON form"):
        get(index, tmp_path)


def test_an_index_without_the_project_is_named(index: IndexServer, tmp_path: Path) -> None:
    with pytest.raises(IndexUnavailableError, match="answered 404"):
        fetch(index.pin, tmp_path, index_url=index.url + "nested/")


def test_an_index_without_the_file_is_named(index: IndexServer, tmp_path: Path) -> None:
    index.filename = "thing-2.0-py3-none-any.whl"
    pin = IndexServer("thing", NAME, CONTENT).pin
    with pytest.raises(IndexUnavailableError, match=f"does not have {NAME}"):
        fetch(pin, tmp_path, index_url=index.url)


@pytest.mark.parametrize("url", ["http://127.0.0.1:9/simple/", "nonsense", "http://[/"])
def test_an_index_that_cannot_be_reached_is_named(url: str, tmp_path: Path) -> None:
    pin = IndexServer("thing", NAME, CONTENT).pin
    with pytest.raises(IndexUnavailableError) as error:
        fetch(pin, tmp_path, index_url=url)
    assert error.value.url == url


@pytest.mark.parametrize(("status", "requests"), [(404, 1), (403, 1), (503, 3), (429, 3)])
def test_only_a_server_that_may_recover_is_asked_again(
    index: IndexServer, tmp_path: Path, status: int, requests: int
) -> None:
    index.file_status = status
    with pytest.raises(DownloadError, match=str(status)):
        get(index, tmp_path)
    assert len(index.transfers) == requests
