"""One pinned file from a Python package index: resumable, verified before it is opened."""

from __future__ import annotations

import hashlib
import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urljoin

import httpx

from gossamer.base.errors import ChecksumMismatchError, DownloadError, IndexUnavailableError

Stage = Literal["wait", "download", "unpack", "convert", "check", "publish", "fingerprint"]

#: Called as progress(stage, done, total): bytes for `download`, `unpack` and `fingerprint`; for the
#: other stages 0 of 1 when they begin and 1 of 1 when they end.
Progress = Callable[[Stage, int, int], None]

SIMPLE_JSON = "application/vnd.pypi.simple.v1+json"
TIMEOUT = httpx.Timeout(30.0, connect=10.0)


@dataclass(frozen=True)
class IndexFile:
    """A file of a project on a package index, known in advance down to its bytes."""

    project: str
    filename: str
    sha256: str
    size: int


def silent(stage: Stage, done: int, total: int) -> None:
    """A `Progress` that shows nothing."""


def sha256_of(path: Path) -> str:
    """The sha256 of a file, in hex."""
    with path.open("rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def verify(path: Path, file: IndexFile) -> None:
    """Check a file of ours or of the operator's against the pin.

    Raises:
        ChecksumMismatchError: it is another file.
    """
    actual = sha256_of(path)
    if actual != file.sha256:
        raise ChecksumMismatchError(str(path), file.sha256, actual)


def fetch(
    file: IndexFile,
    folder: Path,
    *,
    index_url: str,
    progress: Progress = silent,
    attempts: int = 5,
    backoff_s: float = 0.5,
) -> Path:
    """Bring `file` into `folder` and return its path; its bytes have the pinned sha256.

    The bytes are collected in `<filename>.part`, which outlives an interruption: the next call asks
    the server for the rest only, and starts over when the server sends everything again. A file
    that is already there is verified and reused without the network.

    Args:
        attempts: how often in a row a transfer may fail without a single new byte.
        backoff_s: the pause after the first failure in seconds, doubled after each further one.

    Raises:
        IndexUnavailableError: the index does not answer, not in JSON, or does not have the file.
        DownloadError: the transfer stopped and did not continue.
        ChecksumMismatchError: the index or the bytes are at odds with the pin.
    """
    folder.mkdir(parents=True, exist_ok=True)
    done = folder / file.filename
    if done.exists():
        if sha256_of(done) == file.sha256:
            return done
        done.unlink()
    part = folder / f"{file.filename}.part"
    with httpx.Client(timeout=TIMEOUT, follow_redirects=True) as client:
        url = _locate(client, file, index_url)
        # A machine that lost power may have kept a `.part` of the right length and wrong bytes, so
        # a continued file that fails its checksum is fetched whole once more before giving up.
        resumed = part.exists()
        _transfer(client, url, part, file, progress, attempts, backoff_s)
        if resumed and sha256_of(part) != file.sha256:
            part.unlink()
            _transfer(client, url, part, file, progress, attempts, backoff_s)
    actual = sha256_of(part)
    if actual != file.sha256:
        part.unlink()
        raise ChecksumMismatchError(url, file.sha256, actual)
    part.replace(done)
    return done


def _locate(client: httpx.Client, file: IndexFile, index_url: str) -> str:
    """Where the index keeps the file (simple repository API, JSON form: PEP 691)."""
    page = f"{index_url.rstrip('/')}/{file.project}/"
    try:
        answer = client.get(page, headers={"Accept": SIMPLE_JSON})
        answer.raise_for_status()
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        raise IndexUnavailableError(index_url, _reason(error)) from error
    try:
        entries = _entries(answer.json(), str(answer.url))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise IndexUnavailableError(
            index_url, f"its page for {file.project} is not in the JSON form of the simple API"
        ) from error
    if file.filename not in entries:
        raise IndexUnavailableError(index_url, f"it does not have {file.filename}")
    url, sha256 = entries[file.filename]
    if sha256 is not None and sha256 != file.sha256:
        raise ChecksumMismatchError(f"{file.filename} on {index_url}", file.sha256, sha256)
    return url


def _entries(page: Any, page_url: str) -> dict[str, tuple[str, str | None]]:
    """File name → its absolute URL and the sha256 that the index declares for it, if any."""
    return {
        entry["filename"]: (
            urljoin(page_url, entry["url"]),
            entry.get("hashes", {}).get("sha256"),
        )
        for entry in page["files"]
    }


def _transfer(
    client: httpx.Client,
    url: str,
    part: Path,
    file: IndexFile,
    progress: Progress,
    attempts: int,
    backoff_s: float,
) -> None:
    """Append to `part` until it has the pinned size."""
    failures = 0
    while (before := _size(part)) != file.size:
        try:
            _receive(client, url, part, file, progress)
            reason = "the server closed the connection early"
        except httpx.HTTPError as error:
            reason = _reason(error)
            if _is_final(error):
                raise DownloadError(url, _size(part), file.size, reason) from error
        received = _size(part)
        if received == file.size:
            return
        failures = 0 if received > before else failures + 1
        if failures >= attempts:
            raise DownloadError(url, received, file.size, reason)
        time.sleep(backoff_s * 2 ** max(failures - 1, 0))


def _receive(
    client: httpx.Client, url: str, part: Path, file: IndexFile, progress: Progress
) -> None:
    """One request. Returns when the server has no more to send, or has sent too much."""
    have = _size(part)
    if have > file.size:  # the leavings of something else
        part.unlink()
        have = 0
    # Compressed transfers would make byte offsets meaningless.
    headers = {"Accept-Encoding": "identity"} | ({"Range": f"bytes={have}-"} if have else {})
    with client.stream("GET", url, headers=headers) as answer:
        if answer.status_code == httpx.codes.REQUESTED_RANGE_NOT_SATISFIABLE:
            part.unlink(missing_ok=True)
            return
        answer.raise_for_status()
        start = _range_start(answer)
        if start not in (0, have):
            raise httpx.RemoteProtocolError(f"asked for bytes from {have}, got them from {start}")
        with part.open("ab" if start else "wb") as f:
            progress("download", start, file.size)
            for (
                chunk
            ) in answer.iter_raw():  # as it comes: a larger chunk is lost with the connection
                f.write(chunk)
                progress("download", min(f.tell(), file.size), file.size)
                if f.tell() > file.size:
                    break
    if _size(part) > file.size:
        part.unlink()
        raise DownloadError(url, file.size, file.size, "the server sends more than the file has")


def _range_start(answer: httpx.Response) -> int:
    """The offset of the first byte the server sends: 0 when it ignores ranges."""
    if answer.status_code != httpx.codes.PARTIAL_CONTENT:
        return 0
    found = re.match(r"bytes (\d+)-", answer.headers.get("Content-Range", ""))
    return int(found[1]) if found else -1


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _is_final(error: httpx.HTTPError) -> bool:
    """Whether asking again is pointless: the request itself is what the server objects to."""
    if not isinstance(error, httpx.HTTPStatusError):
        return isinstance(error, httpx.UnsupportedProtocol)
    status = error.response.status_code
    return 400 <= status < 500 and status not in (
        httpx.codes.REQUEST_TIMEOUT,
        httpx.codes.TOO_MANY_REQUESTS,
    )


def _reason(error: httpx.HTTPError | httpx.InvalidURL) -> str:
    if isinstance(error, httpx.HTTPStatusError):
        return f"the server answered {error.response.status_code} for {error.request.url}"
    return str(error) or type(error).__name__
