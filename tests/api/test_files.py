"""Files over HTTP: upload, list, show, read, delete; by OpenAI's client where it can do it."""

from __future__ import annotations

import hashlib
import io
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

import httpx
import openai
import pytest
from openai.types import FileObject

from gossamer.store.catalog.opening import Store
from gossamer.store.catalog.views import BaseInfo, Purpose
from tests.api.running import Running, running
from tests.api.sockets import connected, head, read_reply

LINES = b'{"prompt": "a", "completion": "b"}\n' * 3


@pytest.fixture
def tenant(api: Running, request: pytest.FixtureRequest) -> str:
    """The key of a tenant that nobody else uses."""
    return api.new_key(tenant_of(request))


def tenant_of(request: pytest.FixtureRequest) -> str:
    return hashlib.sha256(request.node.nodeid.encode()).hexdigest()


def put(
    server: Running, name: str, data: bytes, tenant: str, purpose: Purpose = "fine-tune"
) -> str:
    """Keep a file past the API; its id."""
    files = server.services.files
    with files.spool() as spool:
        spool.write(data)
        return files.upload(tenant, name, purpose, spool).id


def left_behind(server: Running) -> list[Path]:
    return list((server.services.settings.data_dir / "store" / "spool").iterdir())


@pytest.mark.parametrize("way", ["path", "bytes", "stream", "named"])
def test_the_life_of_a_file(api: Running, tenant: str, tmp_path: Path, way: str) -> None:
    client = api.client(tenant)
    path = tmp_path / "train.jsonl"
    path.write_bytes(LINES)
    ways: dict[str, tuple[Any, str]] = {
        "path": (path, "train.jsonl"),
        "bytes": (LINES, "upload"),
        "stream": (io.BytesIO(LINES), "upload"),
        "named": (("my data.jsonl", LINES), "my data.jsonl"),
    }
    given, name = ways[way]
    made = client.files.create(file=given, purpose="fine-tune")
    assert (made.filename, made.bytes, made.purpose) == (name, len(LINES), "fine-tune")
    assert (made.object, made.status, made.expires_at) == ("file", "processed", None)
    assert abs(made.created_at - time.time()) < 60
    FileObject.model_validate(made.to_dict())  # the client itself does not look so closely
    assert client.files.retrieve(made.id) == made
    assert list(client.files.list()) == [made]
    assert client.files.content(made.id).read() == LINES
    assert client.files.wait_for_processing(made.id, max_wait_seconds=5) == made
    deleted = client.files.delete(made.id)
    assert (deleted.id, deleted.object, deleted.deleted) == (made.id, "file", True)
    assert list(client.files.list()) == []
    for attempt in (client.files.retrieve, client.files.content, client.files.delete):
        with pytest.raises(openai.NotFoundError) as gone:
            attempt(made.id)
        assert gone.value.code == "file_not_found"


def test_what_a_file_says_is_not_looked_at(api: Running, tenant: str) -> None:
    data = b"\xff\x00 no JSON at all"
    client = api.client(tenant)
    made = client.files.create(file=data, purpose="fine-tune")
    assert client.files.content(made.id).read() == data


@pytest.mark.parametrize("name", ["träning 🦋.jsonl", 'a"b;c.jsonl', "../../etc/passwd", "a.b-c_d"])
def test_a_name_is_shown_and_is_no_path(api: Running, tenant: str, name: str) -> None:
    client = api.client(tenant)
    made = client.files.create(file=(name, LINES), purpose="fine-tune")
    assert made.filename == name.replace('"', "%22")  # as the client and every browser write it
    reply = client.files.content(made.id).response
    assert reply.headers["content-type"] == "application/octet-stream"
    assert reply.headers["etag"] == f'"{hashlib.sha256(LINES).hexdigest()}"'
    given = reply.headers["content-disposition"]
    plain = f'attachment; filename="{made.filename}"'
    quoted = f"attachment; filename*=utf-8''{quote(made.filename, safe='')}"
    assert given == (plain if name == "a.b-c_d" else quoted)


def test_lists_in_pages(api: Running, request: pytest.FixtureRequest, tenant: str) -> None:
    client, name = api.client(tenant), tenant_of(request)
    made = [put(api, f"{i}.jsonl", b"%d" % i, name) for i in range(7)]
    result = put(api, "result.csv", b"step,loss\n", name, "fine-tune-results")
    newest_first = [result, *reversed(made)]
    page = client.files.list(limit=3)
    assert [f.id for f in page.data] == newest_first[:3]
    assert page.has_more is True
    assert [f.id for f in page] == newest_first  # the client fetches the others by itself
    assert [f.id for f in client.files.list(limit=2, order="asc")] == newest_first[::-1]
    assert client.files.list().has_more is False
    assert [f.id for f in client.files.list(purpose="fine-tune-results")] == [result]
    assert [f.id for f in client.files.list(purpose="fine-tune", limit=5)] == made[::-1]
    assert list(client.files.list(purpose="batch")) == []
    assert client.files.retrieve(result).purpose == "fine-tune-results"
    # A client that deletes what it lists goes on after a file that is not there any more.
    client.files.delete(newest_first[2])
    assert [f.id for f in client.files.list(after=newest_first[2])] == newest_first[3:]
    with api.http(tenant) as http:
        whole = http.get("/v1/files").json()
        assert (whole["first_id"], whole["last_id"]) == (newest_first[0], newest_first[-1])
        empty = http.get("/v1/files", params={"after": newest_first[-1]}).json()
    assert empty == {
        "object": "list", "data": [], "has_more": False, "first_id": None, "last_id": None,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("query", "param"),
    [
        ({"after": "file-000000000000000000000000"}, "after"),
        ({"after": "x" * 1000}, "after"),
        ({"after": "\0"}, "after"),
        ({"limit": "0"}, "limit"),
        ({"limit": "10001"}, "limit"),
        ({"limit": "many"}, "limit"),
        ({"order": "up"}, "order"),
        ({"before": "x"}, "before"),
    ],
)
def test_a_list_that_cannot_be_is_refused(
    api: Running, tenant: str, query: dict[str, str], param: str
) -> None:
    with api.http(tenant) as http:
        reply = http.get("/v1/files", params=query)
    assert reply.status_code == 400, reply.text
    assert reply.json()["error"]["param"] == param


FILE = ("file", ("a.jsonl", LINES))
PURPOSE = ("purpose", (None, b"fine-tune"))


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ([FILE], "purpose"),
        ([PURPOSE], "file"),
        ([PURPOSE, ("file", ("a.jsonl", b""))], "file"),
        ([PURPOSE, FILE, FILE], "file"),
        ([PURPOSE, PURPOSE, FILE], "purpose"),
        ([("purpose", (None, b"assistants")), FILE], "purpose"),
        ([("purpose", (None, b"fine-tune-results")), FILE], "purpose"),
        ([PURPOSE, FILE, ("name", (None, b"x"))], "name"),
        ([PURPOSE, FILE, ("expires_after[seconds]", (None, b"3600"))], "expires_after"),
        ([PURPOSE, ("file", ("x" * 256, LINES))], "file"),
        ([PURPOSE, ("file", ("a\u2028b", LINES))], "file"),
    ],
)
def test_a_form_that_is_not_as_documented_is_refused(
    api: Running, tenant: str, fields: Any, param: str
) -> None:
    with api.http(tenant) as http:
        reply = http.post("/v1/files", files=fields)
        assert reply.status_code == 400, reply.text
        assert reply.json()["error"]["param"] == param
        assert http.get("/v1/files").json()["data"] == []
    assert left_behind(api) == []


def test_the_client_is_told_that_files_do_not_expire(api: Running, tenant: str) -> None:
    with pytest.raises(openai.BadRequestError) as refused:
        api.client(tenant).files.create(
            file=LINES,
            purpose="fine-tune",
            expires_after={"anchor": "created_at", "seconds": 3600},
        )
    assert (refused.value.param, refused.value.code) == ("expires_after", "unknown_field")


@pytest.mark.parametrize("kind", ["application/octet-stream", "application/json", "text/plain"])
def test_only_a_form_is_read(api: Running, tenant: str, kind: str) -> None:
    with api.http(tenant) as http:
        reply = http.post(
            "/v1/files?purpose=fine-tune", content=LINES, headers={"content-type": kind}
        )
    assert (reply.status_code, reply.json()["error"]["param"]) == (400, "content-type")


def test_a_wrong_purpose_is_refused_before_the_file_has_come(api: Running, tenant: str) -> None:
    begun = b'--x\r\nContent-Disposition: form-data; name="purpose"\r\n\r\nbatch\r\n--x\r\n'
    kind = "multipart/form-data; boundary=x"
    with connected(api.url) as connection:
        request = head("POST", "/v1/files", tenant, content_type=kind, content_length=10**8)
        connection.sendall(request + begun)
        start = time.monotonic()
        status, body = read_reply(connection)
    assert (status, b'"purpose"' in body) == (400, True)
    assert time.monotonic() - start < 5  # a body that stops gets 15 s


@pytest.mark.parametrize(
    "given",
    [
        "%2e%2e%2fkeys",
        "%00",
        "file-",
        "x" * 4096,
        "%E2%80%AEfile",
        "%F0%9F%A6%8B",
        "%FF",
        "a%0d%0ab",
    ],
)
@pytest.mark.parametrize(("method", "end"), [("GET", ""), ("GET", "/content"), ("DELETE", "")])
def test_any_text_may_be_asked_for(
    api: Running, tenant: str, given: str, method: str, end: str
) -> None:
    with api.http(tenant) as http:
        reply = http.request(method, f"/v1/files/{given}{end}")
    assert reply.status_code == 404
    assert reply.json()["error"]["type"] == "invalid_request_error"


def test_another_tenant_s_file_is_like_a_missing_one(api: Running, tenant: str) -> None:
    theirs = put(api, "secret.jsonl", LINES, "default")
    missing = "file-" + "0" * 24
    deleted = api.client(tenant).files.create(file=LINES, purpose="fine-tune").id
    api.client(tenant).files.delete(deleted)

    def attempt(http: httpx.Client, which: int, file_id: str) -> httpx.Response:
        job = {"model": "base", "training_file": file_id}
        own = {"model": "base", "training_file": mine, "validation_file": file_id}
        return (
            lambda: http.get(f"/v1/files/{file_id}"),
            lambda: http.get(f"/v1/files/{file_id}/content"),
            lambda: http.delete(f"/v1/files/{file_id}"),
            lambda: http.post("/v1/fine_tuning/jobs", json=job),
            lambda: http.post("/v1/fine_tuning/jobs", json=own),
        )[which]()

    mine = api.client(tenant).files.create(file=LINES, purpose="fine-tune").id
    with api.http(tenant) as http:
        for which, status in enumerate((404, 404, 404, 400, 400)):
            answers = {
                (reply.status_code, reply.text.replace(file_id, "…"))
                for file_id in (theirs, missing, deleted)
                for reply in [attempt(http, which, file_id)]
            }
            assert len(answers) == 1, answers
            assert answers.pop()[0] == status
        assert http.get("/v1/files", params={"after": theirs}).status_code == 400
        assert [f["id"] for f in http.get("/v1/files").json()["data"]] == [mine]
    assert api.client().files.content(theirs).read() == LINES


@pytest.fixture(scope="module")
def small(api_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """A server where a tenant may keep two files, of 250 kB together and 200 kB at most."""
    limits = {
        "training_file_bytes": 200_000,
        "files_per_tenant": 2,
        "file_bytes_per_tenant": 250_000,
        "adapter_bytes": 1_000,  # another route's
        "body_gap_seconds": 1.0,
        "upload_seconds": 2.0,
    }
    with running(api_base, tmp_path_factory.mktemp("small"), limits) as server:
        yield server


def test_a_file_may_have_so_many_bytes_and_no_more(small: Running) -> None:
    client = small.client(small.new_key("a"))
    made = client.files.create(file=b"x" * 200_000, purpose="fine-tune")
    assert made.bytes == 200_000
    client.files.delete(made.id)
    for nbytes in (200_001, 300_000):  # over the file's limit, and over the body's as declared
        with pytest.raises(openai.APIStatusError) as refused:
            client.files.create(file=b"x" * nbytes, purpose="fine-tune")
        assert (refused.value.status_code, refused.value.code) == (413, "request_too_large")
    assert list(client.files.list()) == []
    assert left_behind(small) == []


def test_an_endless_file_is_cut_at_the_limit(small: Running) -> None:
    sent = 0

    def endless() -> Iterator[bytes]:
        nonlocal sent
        yield b'--x\r\nContent-Disposition: form-data; name="file"; filename="a"\r\n\r\n'
        while sent < 50_000_000:
            sent += 50_000
            yield b" " * 50_000

    with small.http() as http:
        kind = {"content-type": "multipart/form-data; boundary=x"}
        reply = http.post("/v1/files", content=endless(), headers=kind)
    assert (reply.status_code, reply.json()["error"]["code"]) == (413, "request_too_large")
    assert left_behind(small) == []


def test_a_file_that_stops_coming_is_given_up(small: Running) -> None:
    kind = "multipart/form-data; boundary=x"
    with connected(small.url) as connection:
        request = head("POST", "/v1/files", small.key, content_type=kind, content_length=5000)
        connection.sendall(request + b"--x\r\n")
        assert read_reply(connection)[0] == 408
    assert left_behind(small) == []


def test_a_quota_that_is_used_up(small: Running) -> None:
    client = small.client(small.new_key("b"))
    first = client.files.create(file=b"a" * 150_000, purpose="fine-tune")
    with pytest.raises(openai.APIStatusError) as refused:
        client.files.create(file=b"b" * 150_000, purpose="fine-tune")
    assert (refused.value.status_code, refused.value.code) == (413, "quota_exceeded")
    client.files.create(file=b"b" * 50_000, purpose="fine-tune")
    with pytest.raises(openai.ConflictError) as full:
        client.files.create(file=b"c", purpose="fine-tune")
    assert full.value.code == "quota_exceeded"
    assert full.value.response.headers["x-should-retry"] == "false"
    client.files.delete(first.id)
    assert client.files.create(file=b"c", purpose="fine-tune").bytes == 1


def test_a_damaged_file_is_a_409_until_it_is_sent_again(small: Running) -> None:
    client = small.client(small.new_key("c"))
    made = client.files.create(file=b"whole", purpose="fine-tune")
    blob_id = hashlib.sha256(b"whole").hexdigest()
    blob = small.services.settings.data_dir / "store" / "blobs" / blob_id[:2] / blob_id
    blob.write_bytes(b"Whole")
    with pytest.raises(openai.ConflictError) as refused:
        client.files.content(made.id)
    assert refused.value.code == "file_corrupt"
    client.files.create(file=b"whole", purpose="fine-tune")
    assert client.files.content(made.id).read() == b"whole"


def test_a_file_that_is_deleted_while_it_is_read_is_read_to_its_end(
    small: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    key = small.new_key("d")
    client = small.client(key)
    data = b"y" * 200_000
    made = client.files.create(file=data, purpose="fine-tune")
    files, opened, deleted = small.services.files, threading.Event(), threading.Event()
    verified = files._verified

    def waiting(held: Any) -> Any:
        opened.set()
        assert deleted.wait(30)
        return verified(held)

    monkeypatch.setattr(files, "_verified", waiting)
    found: list[bytes] = []
    reader = threading.Thread(target=lambda: found.append(client.files.content(made.id).read()))
    reader.start()
    assert opened.wait(30)
    client.files.delete(made.id)
    deleted.set()
    reader.join(30)
    assert found == [data]
    blob_id = hashlib.sha256(data).hexdigest()
    blob = small.services.settings.data_dir / "store" / "blobs" / blob_id[:2] / blob_id
    deadline = time.monotonic() + 10
    while blob.exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not blob.exists()
    small.services.catalog._holds.check_integrity()


def test_what_another_process_deleted_is_collected_now_and_then(
    api_base: Path, tmp_path: Path
) -> None:
    with running(api_base, tmp_path / "data", collect_seconds=0.1) as server:
        services, data = server.services, server.services.settings.data_dir
        file_id = put(server, "a.jsonl", LINES, "default")
        (blob,) = [p for p in (data / "store" / "blobs").rglob("*") if p.is_file()]
        other = Store(data, BaseInfo("tiny", services.base.fingerprint, {}))
        other.files.delete("default", file_id)
        other.close()
        deadline = time.monotonic() + 10
        while blob.exists() and time.monotonic() < deadline:
            time.sleep(0.02)
        assert not blob.exists()
