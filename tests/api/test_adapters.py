"""Adapters over HTTP: upload, list, show, download, roll back, delete."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from openai import (
    APIStatusError,
    BadRequestError,
    ConflictError,
    NotFoundError,
    UnprocessableEntityError,
)

from gossamer.store.delta import DeltaSet
from tests.api.running import Running, running

PROMPT = "Two adapters may be merged"


def text_of(api: Running, model: str, key: str | None = None) -> str:
    answer = api.client(key).completions.create(
        model=model, prompt=PROMPT, temperature=0, max_tokens=12, extra_body={"ignore_eos": True}
    )
    return answer.choices[0].text


@pytest.fixture
def tenant(api: Running, request: pytest.FixtureRequest) -> str:
    """The key of a tenant that nobody else uses."""
    return api.new_key(hashlib.sha256(request.node.name.encode()).hexdigest())


def test_an_upload_tells_all_about_the_version(api: Running, tenant: str) -> None:
    data = api.make_file(11)
    version = api.upload("sql", 11, tenant)
    table = api.services.engine.table
    assert (version["id"], version["version"], version["current"]) == ("sql:1", 1, True)
    assert version["digest"].startswith("sha256:")
    assert version["bytes"] == len(data)
    assert version["nnz"] == sum(module["nnz"] for module in version["modules"])
    assert version["density"] == pytest.approx(0.02, rel=0.05)
    assert {m["name"]: tuple(m["shape"]) for m in version["modules"]} == table
    assert version["base_verified"] is True
    assert version["warnings"] == []
    assert version["record"] == {"seed": 11}


@pytest.mark.parametrize("way", ["multipart", "name last", "raw", "not active"])
def test_every_way_to_upload_stores_the_same_bytes(api: Running, tenant: str, way: str) -> None:
    data = api.make_file(12)
    with api.http(tenant) as http:
        if way == "raw":
            reply = http.post(
                "/v1/adapters?name=sql",
                content=(data[i : i + 1000] for i in range(0, len(data), 1000)),
                headers={"content-type": "application/octet-stream"},
            )
        elif way == "name last":
            file = ("file", ("a.safetensors", data))
            reply = http.post("/v1/adapters", files=[file, ("name", (None, "sql"))])
        else:
            fields = {"name": "sql"} | ({"activate": "false"} if way == "not active" else {})
            reply = http.post("/v1/adapters", data=fields, files={"file": data})
        assert reply.status_code == 201, reply.text
        assert reply.json()["current"] is (way != "not active")
        stored = http.get("/v1/adapters/sql:1/content")
    assert stored.content == data
    assert stored.headers["etag"] == f'"{hashlib.sha256(data).hexdigest()}"'
    assert stored.headers["x-gossamer-digest"] == reply.json()["digest"]


def test_the_life_of_an_adapter(api: Running, tenant: str) -> None:
    client = api.client(tenant)
    first = api.upload("sql", 13, tenant)
    one = text_of(api, "sql", tenant)
    again = api.upload("sql", 13, tenant)
    assert again["version"] == 1  # a repeated upload makes no new version
    second = api.upload("sql", 14, tenant)
    assert second["version"] == 2
    two = text_of(api, "sql", tenant)
    assert one != two
    assert text_of(api, "sql:1", tenant) == one
    with api.http(tenant) as http:
        shown = http.get("/v1/adapters/sql").json()
        assert [v["id"] for v in shown["versions"]] == ["sql:1", "sql:2"]
        assert [v["resident_bytes"] > 0 for v in shown["versions"]] == [True, True]
        listed = http.get("/v1/adapters").json()
        assert listed["usage"]["adapters"] == 1
        assert listed["usage"]["bytes"] == first["bytes"] + second["bytes"]
        rolled = http.post("/v1/adapters/sql/rollback")
        assert (rolled.status_code, rolled.json()["id"]) == (200, "sql:1")
        assert text_of(api, "sql", tenant) == one
        assert http.post("/v1/adapters/sql/rollback").status_code == 409
        forward = http.post("/v1/adapters/sql/rollback", json={"version": 2})
        assert forward.json()["id"] == "sql:2"
    with pytest.raises(ConflictError) as conflict:
        client.models.delete("sql:2")
    assert conflict.value.code == "current_version"
    assert conflict.value.response.headers["x-should-retry"] == "false"
    assert client.models.delete("sql:1").deleted
    with pytest.raises(NotFoundError):
        text_of(api, "sql:1", tenant)
    assert text_of(api, "sql", tenant) == two
    deleted = client.models.delete("sql")
    assert (deleted.id, deleted.object, deleted.deleted) == ("sql", "model", True)
    with pytest.raises(NotFoundError):
        text_of(api, "sql", tenant)
    assert [model.id for model in client.models.list()] == ["base"]


def test_a_new_version_does_not_reach_a_request_that_is_under_way(
    api: Running, tenant: str
) -> None:
    """Nor does a delete; and what the old one computed is not found by the next request."""
    api.upload("sql", 51, tenant)
    client = api.client(tenant)
    prompt = "Two adapters may be merged into one with weights, and one batch may hold them all. "

    def start(model: str) -> Iterator[Any]:
        return iter(
            client.completions.create(
                model=model,
                prompt=prompt,
                temperature=0,
                max_tokens=120,
                stream=True,
                extra_body={"ignore_eos": True},
            )
        )

    def rest(stream: Iterator[Any]) -> str:
        return "".join(chunk.choices[0].text for chunk in stream)

    old = rest(start("sql"))
    under_way = start("sql")
    first = next(under_way).choices[0].text
    api.upload("sql", 52, tenant)
    client.models.delete("sql:1")
    new = rest(start("sql"))
    assert first + rest(under_way) == old
    assert new != old
    assert rest(start("sql")) == new


def test_models_are_the_base_and_the_adapters(api: Running, tenant: str) -> None:
    client = api.client(tenant)
    digest = api.upload("sql", 15, tenant)["digest"]
    base, adapter = client.models.list()
    assert (base.id, adapter.id) == ("base", "sql")
    assert base.owned_by == "gossamer"
    extra: Any = adapter
    assert (extra.parent, extra.root) == ("base", api.services.base.name)
    assert abs(adapter.created - base.created) < 3600
    for name in ("base", api.services.base.name, "sql", "sql:1", f"sql@{digest}"):
        assert client.models.retrieve(name).object == "model"
    for name in ("sql:2", "nobody", "sql*1", "a/b/c", "sql@sha256:00"):
        with pytest.raises(NotFoundError):
            client.models.retrieve(name)
    with pytest.raises(BadRequestError):
        client.models.delete("base")


@pytest.mark.parametrize(
    "name", ["SQL", "../a", "a/b", "a:1", "a@step-1", "", "n" * 129, "é", "\n"]
)
def test_a_name_that_cannot_be_is_refused(api: Running, tenant: str, name: str) -> None:
    with api.http(tenant) as http:
        reply = http.post("/v1/adapters", data={"name": name}, files={"file": api.make_file(16)})
    assert reply.status_code == 400, reply.text
    assert reply.json()["error"]["param"] == "name"


def test_the_base_s_names_are_its_own(api: Running, tenant: str) -> None:
    for name in ("base", api.services.base.name.lower()):
        with api.http(tenant) as http:
            reply = http.post(
                "/v1/adapters", data={"name": name}, files={"file": api.make_file(16)}
            )
        assert reply.status_code == 400


def test_a_bad_file_is_a_422_that_names_the_reason(api: Running, tenant: str) -> None:
    client = api.client(tenant)
    with pytest.raises(UnprocessableEntityError) as refused:
        client.post(
            "/adapters",
            body={"name": "sql"},
            files={"file": b"\x80\x04\x95not an adapter"},
            options={"headers": {"content-type": "multipart/form-data"}},
            cast_to=object,
        )
    assert refused.value.code in ("invalid_adapter_file", "unsupported_file")
    assert [model.id for model in client.models.list()] == ["base"]


def test_an_adapter_that_makes_nan_fails_alone(
    api: Running, tenant: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not even a file's largest values overflow this model, so this one is damaged on its way.

    It stays in the engine's memory: nobody else may upload what has its digest.
    """
    wild = api.upload("wild", 66_217, tenant)["digest"]
    api.upload("tame", 18, tenant)
    expected = text_of(api, "tame", tenant)
    residency: Any = api.services.engine._loop._residency
    source = residency._source

    def damaging(digest: str) -> DeltaSet:
        found: DeltaSet = source(digest)
        if digest == wild:
            for delta in found.deltas.values():
                delta.values.setflags(write=True)
                delta.values[:] = np.nan
        return found

    monkeypatch.setattr(residency, "_source", damaging)
    with ThreadPoolExecutor(4) as pool:
        beside = [pool.submit(text_of, api, "tame", tenant) for _ in range(3)]
        with pytest.raises(APIStatusError) as failed:
            text_of(api, "wild", tenant)
        assert [future.result() for future in beside] == [expected] * 3
    assert (failed.value.status_code, failed.value.code) == (500, "non_finite_logits")
    assert failed.value.response.headers["x-should-retry"] == "false"
    assert text_of(api, "tame", tenant) == expected


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ([("file", (None, b"x"))], "name"),
        ([("name", (None, b"a"))], "file"),
        ([("name", (None, b"a")), ("name", (None, b"b")), ("file", (None, b"x"))], "name"),
        ([("name", (None, b"a")), ("file", (None, b"x")), ("file", (None, b"y"))], "file"),
        ([("name", (None, b"a")), ("evil", (None, b"b"))], "evil"),
        ([("name", (None, b"a" * 5000)), ("file", (None, b"x"))], "name"),
        (
            [("activate", (None, b"maybe")), ("name", (None, b"a")), ("file", (None, b""))],
            "activate",
        ),
    ],
)
def test_a_form_that_is_not_as_documented_is_refused(
    api: Running, tenant: str, fields: Any, param: str
) -> None:
    with api.http(tenant) as http:
        reply = http.post("/v1/adapters", files=fields)
    assert reply.status_code == 400, reply.text
    assert reply.json()["error"]["param"] == param


@pytest.mark.parametrize(
    ("kind", "body"),
    [
        ("multipart/form-data", b"--x\r\n"),
        ("multipart/form-data; boundary=", b"--\r\n"),
        ("multipart/form-data; boundary=" + "b" * 300, b""),
        ("multipart/form-data; boundary=x", b""),
        ("multipart/form-data; boundary=x", b"no part at all"),
        ("multipart/form-data; boundary=x", b"--x\r\nContent-Disposition: form-data\r\n\r\n1\r\n"),
        (
            "multipart/form-data; boundary=x",
            b'--x\r\nContent-Disposition: form-data; name="name"\r\n\r\na\r\n'
            b'--x\r\nContent-Disposition: form-data; name="file"\r\n\r\nhalf',
        ),
        ("multipart/form-data; boundary=x", b"--x\r\n" + b"a: b\r\n" * 1000),
        (
            "multipart/form-data; boundary=x",
            b'--x\r\nContent-Disposition: form-data; name="f"\r\n\r\n\r\n' * 100_000,
        ),
        ("multipart/form-data; boundary=x", b"--x\r\n\r\n\r\n" * 100_000),
        ("multipart/form-data; boundary=x", b"--x\r\na: " + b"b" * 100_000),
        ("application/json", b"{}"),
        ("text/plain", b""),
    ],
)
def test_a_malformed_form_is_refused(api: Running, tenant: str, kind: str, body: bytes) -> None:
    with api.http(tenant) as http:
        reply = http.post("/v1/adapters", content=body, headers={"content-type": kind})
    assert reply.status_code == 400, reply.text
    assert reply.json()["error"]["type"] == "invalid_request_error"


def test_nothing_of_refused_uploads_stays_on_the_disk(api: Running) -> None:
    data_dir = api.services.settings.data_dir
    assert list((data_dir / "store" / "spool").iterdir()) == []
    assert api.services.admission._uploads.total() == 0


@pytest.fixture(scope="module")
def small(api_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """A server where a tenant may keep two adapters."""
    limits = {"adapters_per_tenant": 2}
    with running(api_base, tmp_path_factory.mktemp("small"), limits) as server:
        yield server


def test_a_quota_that_is_used_up_is_a_409(small: Running) -> None:
    for name, seed in (("a", 1), ("b", 2)):
        small.upload(name, seed)
    with small.http() as http:
        reply = http.post("/v1/adapters", data={"name": "c"}, files={"file": small.make_file(3)})
        assert (reply.status_code, reply.json()["error"]["code"]) == (409, "quota_exceeded")
        assert http.get("/v1/adapters").json()["usage"]["adapters"] == 2


def test_a_damaged_blob_is_a_409_and_the_others_still_serve(small: Running) -> None:
    other = small.new_key("other")
    small.upload("whole", 21, other)
    version = small.upload("damaged", 22, other)
    (blob,) = (
        path
        for path in (small.services.settings.data_dir / "store" / "blobs").glob("*/*")
        if path.stat().st_size == version["bytes"] and path.read_bytes() == small.make_file(22)
    )
    data = bytearray(blob.read_bytes())
    data[-1] ^= 1
    blob.write_bytes(data)
    with pytest.raises(ConflictError) as refused:
        text_of(small, "damaged", other)
    assert refused.value.code == "adapter_corrupt"
    assert text_of(small, "whole", other)
    small.upload("damaged", 22, other)  # the same bytes again restore it
    assert text_of(small, "damaged", other)
