"""The routes of vLLM's and LoRAX's clients, against a real engine."""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
import requests
import schemathesis
from schemathesis.checks import CHECKS, load_all_checks

from gossamer.api.errors import ApiError
from gossamer.api.loaded_names import LoadedNames
from tests.api.running import Running

PROMPT = "A sparse adapter changes"


@pytest.fixture
def http(api: Running) -> Iterator[httpx.Client]:
    with api.http() as client:
        yield client


def unique() -> str:
    return f"n-{uuid.uuid4().hex[:12]}"


def complete(http: httpx.Client, model: str = "base", **body: Any) -> httpx.Response:
    options = {"temperature": 0, "max_tokens": 20, "ignore_eos": True, "return_token_ids": True}
    return http.post("/v1/completions", json={"model": model, "prompt": PROMPT, **options, **body})


def said(reply: httpx.Response) -> tuple[str, str]:
    assert reply.status_code == 200, reply.text
    return reply.json()["choices"][0]["text"], reply.headers["x-gossamer-mix"]


def load(http: httpx.Client, name: str, path: str, **body: Any) -> httpx.Response:
    return http.post("/v1/load_lora_adapter", json={"lora_name": name, "lora_path": path, **body})


def unload(http: httpx.Client, name: str, **body: Any) -> httpx.Response:
    return http.post("/v1/unload_lora_adapter", json={"lora_name": name, **body})


def refusal(reply: httpx.Response) -> tuple[int, str]:
    return reply.status_code, reply.json()["error"]["param"]


def generate(http: httpx.Client, route: str = "/generate", **parameters: Any) -> httpx.Response:
    body: dict[str, Any] = {"inputs": parameters.pop("inputs", PROMPT)}
    if "stream" in parameters:
        body["stream"] = parameters.pop("stream")
    if parameters:
        body["parameters"] = parameters
    return http.post(route, json=body)


def test_a_loaded_name_means_the_adapter_until_it_is_unloaded(http: httpx.Client) -> None:
    name = unique()
    assert complete(http, name).status_code == 404
    loaded = load(http, name, "sql:1", lora_int_id=7, base_model_name="base")
    assert loaded.status_code == 200
    assert loaded.headers["content-type"].startswith("text/plain")
    assert loaded.text == f"Success: LoRA adapter '{name}' added successfully."
    assert said(complete(http, name)) == said(complete(http, "sql"))
    removed = unload(http, name, lora_int_id=7)
    assert removed.status_code == 200
    assert removed.text == f"Success: LoRA adapter '{name}' removed successfully."
    gone = complete(http, name)
    assert refusal(gone) == (404, "model")
    assert load(http, name, "math").status_code == 200
    assert said(complete(http, name)) == said(complete(http, "math"))


def test_a_loaded_name_may_be_part_of_a_mix(http: httpx.Client) -> None:
    one, two = unique(), unique()
    load(http, one, "sql")
    load(http, two, "math:1")
    mix = said(complete(http, "sql*0.7+math*-0.3"))
    assert said(complete(http, f"{one}*0.7 + {two}*-0.3")) == mix
    assert said(complete(http, f"{one}*0.7+math*-0.3")) == mix
    merged = {"ids": [one, "math"], "weights": [0.7, -0.3]}
    assert said(complete(http, merged_adapters=merged)) == mix
    assert refusal(complete(http, f"{one}+{unique()}")) == (404, "model")
    assert refusal(complete(http, f"{one}:1")) == (404, "model")


def test_a_loaded_name_follows_the_current_version(api: Running, http: httpx.Client) -> None:
    name, stored = unique(), unique()
    api.upload(stored, 11)
    load(http, name, stored)
    first = said(complete(http, name))
    api.upload(stored, 12)
    assert said(complete(http, name)) == said(complete(http, f"{stored}:2")) != first


def test_an_adapter_is_loaded_under_its_own_name_already(api: Running, http: httpx.Client) -> None:
    stored = unique()
    api.upload(stored, 13)
    api.upload(stored, 14)
    for path in (stored, f"{stored}:2", f"default/{stored}"):
        assert load(http, stored, path).status_code == 200
    for path in (f"{stored}:1", "sql"):
        for inplace in (False, True):
            refused = load(http, stored, path, load_inplace=inplace)
            assert refusal(refused) == (400, "lora_name")
            assert "has already been loaded" in refused.json()["error"]["message"]
    assert said(complete(http, stored)) == said(complete(http, f"{stored}:2"))


def test_a_loaded_name_is_replaced_only_when_told_to(http: httpx.Client) -> None:
    name = unique()
    load(http, name, "sql")
    for path in ("sql", "math"):
        refused = load(http, name, path)
        assert refusal(refused) == (400, "lora_name")
        assert "has already been loaded" in refused.json()["error"]["message"]
        assert "load_inplace" in refused.json()["error"]["message"]
    assert said(complete(http, name)) == said(complete(http, "sql"))
    assert load(http, name, "math", load_inplace=True).status_code == 200
    assert said(complete(http, name)) == said(complete(http, "math"))


@pytest.mark.parametrize(
    "path",
    ["/data/sql", "./sql", "../sql", "~/sql", "C:\\sql", "s3://bucket/sql", "https://x.org/sql"],
)
def test_a_path_of_a_file_is_told_where_adapters_are_uploaded(
    http: httpx.Client, path: str
) -> None:
    refused = load(http, unique(), path)
    assert refusal(refused) == (400, "lora_path")
    assert "POST /v1/adapters" in refused.json()["error"]["message"]


@pytest.mark.parametrize(
    "path", ["nobody", "sql:9", "owner/Model-7B", "acme/sql", "sql*0.5", "base"]
)
def test_what_is_not_stored_is_the_same_404_as_elsewhere(http: httpx.Client, path: str) -> None:
    refused, elsewhere = load(http, unique(), path), http.get(f"/v1/models/{'nobody'}")
    assert refusal(refused) == (404, "lora_path")
    error, expected = refused.json()["error"], elsewhere.json()["error"]
    assert error["code"] == expected["code"] == "model_not_found"
    assert error["message"] == expected["message"].replace("nobody", path)


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"lora_path": "sql"}, "lora_name"),
        ({"lora_name": "x"}, "lora_path"),
        ({"lora_name": "", "lora_path": "sql"}, "lora_name"),
        ({"lora_name": "Not A Name", "lora_path": "sql"}, "lora_name"),
        ({"lora_name": "x:1", "lora_path": "sql"}, "lora_name"),
        ({"lora_name": "x" * 129, "lora_path": "sql"}, "lora_name"),
        ({"lora_name": "base", "lora_path": "sql"}, "lora_name"),
        ({"lora_name": "x", "lora_path": "sql", "base_model_name": "other"}, "base_model_name"),
        ({"lora_name": "x", "lora_path": "sql", "load_inplace": "yes"}, "load_inplace"),
        ({"lora_name": "x", "lora_path": "sql", "rank": 8}, "rank"),
    ],
)
def test_a_load_that_cannot_be_names_its_field(
    http: httpx.Client, body: dict[str, Any], param: str
) -> None:
    assert refusal(http.post("/v1/load_lora_adapter", json=body)) == (400, param)


def test_unloading_deletes_nothing(api: Running, http: httpx.Client) -> None:
    stored = unique()
    api.upload(stored, 15)
    refused = unload(http, stored)
    assert refusal(refused) == (400, "lora_name")
    assert f"DELETE /v1/adapters/{stored}" in refused.json()["error"]["message"]
    assert http.get(f"/v1/adapters/{stored}").status_code == 200
    name = unique()
    load(http, name, stored)
    unload(http, name)
    assert http.get(f"/v1/adapters/{stored}").status_code == 200
    missing = unload(http, name)
    assert refusal(missing) == (404, "lora_name")
    assert missing.json()["error"]["message"] == f"The lora adapter '{name}' cannot be found."
    assert refusal(unload(http, name, lora_path="sql")) == (400, "lora_path")


def test_a_stored_adapter_goes_before_a_name_and_a_ring_of_names_ends(
    api: Running, http: httpx.Client
) -> None:
    one, two = unique(), unique()
    stored = api.services.catalog
    api.upload(one, 16)
    load(http, two, one)
    stored.upload("default", two, [api.make_file(17)])  # as a job does: the server is not told
    assert http.delete(f"/v1/adapters/{one}").status_code == 200
    load(http, one, two)
    assert said(complete(http, one)) == said(complete(http, f"{two}:1"))
    # now each of the two names means the other one
    stored.delete("default", two)
    for model in (one, two, f"{one}+{two}"):
        assert refusal(complete(http, model)) == (404, "model")
    assert len(api.services.catalog._holds) == 0


@pytest.mark.parametrize("how", ["uploaded", "asked for", "in a mix", "listed", "shown"])
def test_a_name_does_not_come_back_when_the_adapter_before_it_goes(
    api: Running, http: httpx.Client, how: str
) -> None:
    name = unique()
    load(http, name, "sql")
    if how == "uploaded":
        api.upload(name, 18)
    else:
        api.services.catalog.upload("default", name, [api.make_file(18)])
    if how == "asked for":
        assert said(complete(http, name)) == said(complete(http, f"{name}:1"))
    elif how == "in a mix":
        assert said(complete(http, f"{name}*0.5+math*0.5"))
    elif how == "listed":
        assert [one["root"] for one in models(http) if one["id"] == name] == [
            api.services.base.name
        ]
    elif how == "shown":
        assert http.get(f"/v1/models/{name}").json()["root"] == api.services.base.name
    api.services.catalog.delete("default", name)
    assert refusal(complete(http, name)) == (404, "model")


def models(http: httpx.Client) -> list[dict[str, Any]]:
    listed: list[dict[str, Any]] = http.get("/v1/models").json()["data"]
    return listed


def test_loaded_names_are_listed_as_vllm_lists_them(api: Running, http: httpx.Client) -> None:
    name, lost, stored = unique(), unique(), unique()
    api.upload(stored, 19)
    load(http, name, "sql:1")
    load(http, lost, stored)
    before = {one["id"]: one for one in models(http)}
    assert (before[name]["parent"], before[name]["root"]) == ("base", "sql:1")
    assert (before["sql"]["parent"], before["sql"]["root"]) == ("base", before["base"]["root"])
    assert before[name]["max_model_len"] == before["base"]["max_model_len"]
    assert http.get(f"/v1/models/{name}").json() == before[name]
    http.delete(f"/v1/adapters/{stored}")
    load(http, stored, "math")  # a name stands for a stored adapter, for no other name
    assert (
        refusal(complete(http, lost)) == refusal(http.get(f"/v1/models/{lost}")) == (404, "model")
    )
    assert lost not in {one["id"] for one in models(http)}
    with api.http(api.new_key(unique())) as other:
        assert [one["id"] for one in models(other)] == ["base"]
        assert other.get(f"/v1/models/{name}").status_code == 404
    for loaded in (name, lost, stored):
        unload(http, loaded)
    assert not {name, lost, stored} & {one["id"] for one in models(http)}


def test_names_are_each_tenants_own(api: Running, http: httpx.Client) -> None:
    name, tenant = unique(), unique()
    load(http, name, "sql")
    with api.http(api.new_key(tenant)) as other:
        assert refusal(complete(other, name)) == (404, "model")
        assert refusal(unload(other, name)) == (404, "lora_name")
        assert refusal(load(other, name, "sql")) == (404, "lora_path")
        assert refusal(load(other, name, "default/sql")) == (404, "lora_path")
        assert refusal(generate(other, adapter_id=name)) == (404, "parameters.adapter_id")
    assert said(complete(http, name)) == said(complete(http, "sql"))


def test_a_tenant_has_only_so_many_names() -> None:
    names = LoadedNames(1)
    names.put("a", "x", "sql")
    names.put("a", "x", "math")
    names.put("b", "y", "sql")
    with pytest.raises(ApiError) as caught:
        names.put("a", "y", "sql")
    assert (caught.value.status_code, caught.value.param) == (409, "lora_name")
    assert names.get("a", "x") == "math"
    assert names.remove("a", "x")
    names.put("a", "y", "sql")


def test_all_of_them_want_a_key(api: Running) -> None:
    with api.http("") as nobody:
        for path in ("/", "/generate", "/generate_stream"):
            assert nobody.post(path, json={"inputs": PROMPT}).status_code == 401
        assert load(nobody, "x", "sql").status_code == unload(nobody, "x").status_code == 401


def test_replies_and_streams_are_what_the_description_says(api: Running) -> None:
    load_all_checks()
    checks: Any = [
        CHECKS.get_one(name)
        for name in (
            "status_code_conformance",
            "content_type_conformance",
            "response_schema_conformance",
        )
    ]
    with api.http() as http:
        raw = http.get("/openapi.json").json()
    schema = schemathesis.openapi.from_dict(raw)
    schema.config.update(base_url=api.url)
    name, asked = unique(), {"inputs": PROMPT, "parameters": {"details": True}}
    messages = [{"role": "user", "content": PROMPT}]
    completion = {"model": "base", "prompt": PROMPT, "max_tokens": 2}
    chat = {"model": "base", "messages": messages, "max_tokens": 2}
    sent: list[tuple[str, dict[str, Any]]] = [
        ("/v1/load_lora_adapter", {"lora_name": name, "lora_path": "sql"}),
        ("/v1/unload_lora_adapter", {"lora_name": name}),
        ("/generate", asked),
        ("/generate", {"inputs": PROMPT}),
        ("/", asked),
        ("/", asked | {"stream": True}),
        ("/generate_stream", asked),
        ("/v1/completions", completion | {"stream": True}),
        ("/v1/chat/completions", chat | {"stream": True}),
    ]
    with requests.Session() as session:
        for path, body in sent:
            case = schema[path]["POST"].Case(body=body, media_type="application/json")
            headers = {"authorization": f"Bearer {api.key}"}
            response = case.call(session=session, headers=headers, timeout=30)
            assert response.status_code == 200, response.text
            case.validate_response(response, checks=checks)
    event = raw["paths"]["/"]["post"]["responses"]["200"]["content"]["text/event-stream"]
    reference = event["schema"]["properties"]["data"]["contentSchema"]["$ref"]
    assert "token" in raw["components"]["schemas"][reference.rpartition("/")[2]]["properties"]
