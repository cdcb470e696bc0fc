"""Content-addressed blobs, in a folder and in an object store."""

from __future__ import annotations

import fcntl
import hashlib
import os
import subprocess
import sys
from pathlib import Path

import pytest

from gossamer.store.blobs import Blobs
from gossamer.store.catalog.errors import BlobCorrupt, BlobMissing, BlobStoreFailed, UploadTooLarge
from gossamer.store.failpoints import Failpoint
from gossamer.store.spool import SUFFIX, Spool, sweep
from tests.store.support import start_child

DATA = bytes(range(256)) * 9000  # 2.3 MB: more than one chunk


@pytest.fixture(params=["folder", "object store", "S3"])
def blobs(request: pytest.FixtureRequest, tmp_path: Path) -> Blobs:
    if request.param == "folder":
        return Blobs((tmp_path / "store").as_uri())
    s3 = request.param == "S3"
    url = request.getfixturevalue("bucket") if s3 else "memory:///"
    return Blobs(url, spool=tmp_path / "spool")


def put(blobs: Blobs, data: bytes) -> str:
    with blobs.spool() as spool:
        for start in range(0, len(data), 100_000):
            spool.write(data[start : start + 100_000])
        return blobs.put(spool)


def test_a_blob_reads_back_under_the_hash_of_its_bytes(blobs: Blobs) -> None:
    blob_id = put(blobs, DATA)
    assert blob_id == hashlib.sha256(DATA).hexdigest()
    with blobs.checkout(blob_id) as path:
        assert path.read_bytes() == DATA
    assert blobs.stat(blob_id).nbytes == len(DATA)
    assert [(s.blob_id, s.nbytes) for s in blobs.list()] == [(blob_id, len(DATA))]
    assert blobs.sweep() == 0


def test_the_same_bytes_twice_are_one_blob(blobs: Blobs) -> None:
    assert put(blobs, DATA) == put(blobs, DATA)
    assert len(list(blobs.list())) == 1


def test_an_empty_upload_is_a_blob(blobs: Blobs) -> None:
    blob_id = put(blobs, b"")
    with blobs.checkout(blob_id) as path:
        assert path.read_bytes() == b""


def test_a_missing_blob(blobs: Blobs) -> None:
    missing = "0" * 64
    with pytest.raises(BlobMissing), blobs.checkout(missing):
        pass
    with pytest.raises(BlobMissing):
        blobs.stat(missing)
    blobs.delete(missing)
    blobs.quarantine(missing)


def test_delete_and_quarantine_take_a_blob_away(blobs: Blobs) -> None:
    for take_away in (blobs.delete, blobs.quarantine):
        blob_id = put(blobs, DATA)
        take_away(blob_id)
        with pytest.raises(BlobMissing), blobs.checkout(blob_id):
            pass
        assert list(blobs.list()) == []


def test_one_byte_over_the_cap_is_refused_and_leaves_nothing(tmp_path: Path) -> None:
    blobs = Blobs((tmp_path / "store").as_uri(), upload_bytes=1000)
    with blobs.spool() as spool:
        spool.write(bytes(1000))
        with pytest.raises(UploadTooLarge) as caught:
            spool.write(b"x")
        assert caught.value.limit == 1000
        assert spool.size == 1000
    assert list((tmp_path / "store" / "spool").iterdir()) == []


def test_an_object_store_needs_a_folder_for_temp_files() -> None:
    with pytest.raises(ValueError, match="local folder"):
        Blobs("memory:///")


@pytest.mark.parametrize("damage", ["flip", "cut", "grow"])
def test_damaged_bytes_are_never_handed_out(tmp_path: Path, damage: str) -> None:
    blobs = Blobs((tmp_path / "store").as_uri())
    blob_id = put(blobs, DATA)
    path = tmp_path / "store" / "blobs" / blob_id[:2] / blob_id
    data = bytearray(DATA)
    if damage == "flip":
        data[len(data) // 2] ^= 1
    path.write_bytes({"flip": data, "cut": data[:-1], "grow": data + b"\0"}[damage])
    with pytest.raises(BlobCorrupt) as caught, blobs.checkout(blob_id):
        pass
    assert caught.value.found == hashlib.sha256(path.read_bytes()).hexdigest()
    put(blobs, DATA)
    with blobs.checkout(blob_id) as restored:
        assert restored.read_bytes() == DATA


def test_a_failing_folder_is_not_taken_for_a_missing_blob(tmp_path: Path) -> None:
    blobs = Blobs((tmp_path / "store").as_uri())
    blob_id = put(blobs, DATA)
    path = tmp_path / "store" / "blobs" / blob_id[:2] / blob_id
    path.unlink()
    path.mkdir()  # reading it is an error (EISDIR) for root as well
    with pytest.raises(BlobStoreFailed), blobs.checkout(blob_id):
        pass


def test_a_blob_is_durable_before_put_returns(tmp_path: Path) -> None:
    # What the kernel was asked, in order: bytes synced, renamed, names synced.
    script = f"""
from gossamer.store.blobs import Blobs
blobs = Blobs({(tmp_path / "store").as_uri()!r})
with blobs.spool() as spool:
    spool.write(b"x" * 100)
    print(blobs.put(spool))
"""
    trace = tmp_path / "trace"
    calls = "trace=fsync,rename,renameat,renameat2"
    try:
        run = subprocess.run(
            ["strace", "-f", "-y", "-o", trace, "-e", calls, sys.executable, "-c", script],
            capture_output=True,
            text=True,
            timeout=60,
        )
    except FileNotFoundError:
        pytest.skip("strace is not installed")
    if run.returncode:
        pytest.skip(f"strace cannot run here: {run.stderr[-200:]}")
    blob_id = run.stdout.strip()
    lines = [line for line in trace.read_text().splitlines() if str(tmp_path) in line]
    synced = next(i for i, line in enumerate(lines) if "fsync" in line and SUFFIX in line)
    renamed = next(i for i, line in enumerate(lines) if "rename" in line and blob_id in line)
    after = [line for line in lines[renamed:] if "fsync" in line]
    assert synced < renamed
    assert any(f"blobs/{blob_id[:2]}>" in line for line in after)
    assert any("blobs>" in line for line in lines if "fsync" in line)


def test_the_sweep_leaves_running_uploads_alone(tmp_path: Path) -> None:
    mine = Spool(tmp_path, 100)
    mine.write(b"still running")
    dead = tmp_path / f"dead{SUFFIX}"
    dead.write_bytes(b"its process was killed")
    (tmp_path / "notes.txt").write_text("not a temp file")
    assert sweep(tmp_path) == 1
    assert not dead.exists()
    assert mine.path.exists()
    mine.discard()
    assert [p.name for p in tmp_path.iterdir()] == ["notes.txt"]


SWEEP = """
import sys
from pathlib import Path
from gossamer.store.spool import sweep
print(sweep(Path(sys.argv[1])))
"""


def test_another_process_cannot_sweep_a_running_upload(tmp_path: Path) -> None:
    with Spool(tmp_path, 100) as mine:
        child = start_child(SWEEP, tmp_path)
        assert child.communicate(timeout=60) == ("0\n", "")
        assert mine.path.exists()


def test_a_temp_file_swept_before_its_lock_is_made_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The one moment without a lock lies between open and flock; step into it once.
    real = fcntl.flock
    stolen: list[Path] = []

    def steal_first(file: object, operation: int) -> None:
        if not stolen:
            stolen.extend(tmp_path.iterdir())
            stolen[0].unlink()
        real(file, operation)  # type: ignore[arg-type]

    monkeypatch.setattr(fcntl, "flock", steal_first)
    with Spool(tmp_path, 100) as spool:
        assert spool.path.exists()
        assert spool.path != stolen[0]


def test_temp_files_are_private(tmp_path: Path) -> None:
    with Spool(tmp_path, 100) as spool:
        assert spool.path.stat().st_mode & 0o777 == 0o600


def test_no_file_descriptor_is_left(tmp_path: Path) -> None:
    blobs = Blobs((tmp_path / "store").as_uri())
    put(blobs, DATA)
    before = len(os.listdir("/proc/self/fd"))  # noqa: PTH208
    for i in range(20):
        with blobs.checkout(put(blobs, DATA + bytes([i]))):
            pass
    assert len(os.listdir("/proc/self/fd")) == before  # noqa: PTH208


def test_put_passes_its_failpoints_in_order(tmp_path: Path) -> None:
    seen: list[Failpoint] = []
    blobs = Blobs((tmp_path / "store").as_uri(), failpoint=seen.append)
    with blobs.spool() as spool:
        spool.write(b"x")
        spool.seal()
        blobs.put(spool)
    assert seen == [
        Failpoint.UPLOAD_SPOOLING,
        Failpoint.UPLOAD_SPOOLED,
        Failpoint.UPLOAD_SYNCED,
        Failpoint.UPLOAD_RENAMED,
        Failpoint.UPLOAD_STORED,
    ]
