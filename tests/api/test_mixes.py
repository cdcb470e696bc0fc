"""The three ways to name what a request runs with, and that they mean the same."""

from __future__ import annotations

from typing import Any

import httpx
import pytest

from tests.api.running import Running

PROMPT = "A sparse adapter changes"


def ask(api: Running, model: str = "base", **body: Any) -> httpx.Response:
    with api.http() as http:
        return http.post(
            "/v1/completions",
            json={
                "model": model,
                "prompt": PROMPT,
                "temperature": 0,
                "max_tokens": 12,
                "ignore_eos": True,
                **body,
            },
        )


def said(reply: httpx.Response) -> tuple[str, str]:
    assert reply.status_code == 200, reply.text
    return reply.json()["choices"][0]["text"], reply.headers["x-gossamer-mix"]


def test_an_adapter_changes_the_text_and_every_name_of_it_means_the_same(api: Running) -> None:
    with api.http() as http:
        digest = http.get("/v1/adapters/sql").json()["versions"][0]["digest"]
    base, sql = said(ask(api)), said(ask(api, "sql"))
    assert base[0] != sql[0]
    assert base[1] != sql[1]
    for name in ("sql:1", f"sql@{digest}", "default/sql", "sql*1", "sql*1.0", "sql*0.5+sql*0.5"):
        assert said(ask(api, name)) == sql
    assert said(ask(api, "sql*0")) == base


def test_a_mix_does_not_depend_on_the_order_or_the_way_it_is_written(api: Running) -> None:
    mix = said(ask(api, "sql*0.7+math*0.3"))
    body = {"ids": ["math", "sql"], "weights": [0.3, 0.7], "merge_strategy": "linear"}
    assert said(ask(api, "math*0.3 + sql*0.7")) == mix
    assert said(ask(api, merged_adapters=body)) == mix
    assert said(ask(api, "sql*0.3+math*0.7"))[1] != mix[1]
    doubled = {**body, "weights": [0.15, 0.35], "lambda": 2.0}
    assert said(ask(api, merged_adapters=doubled))[1] == mix[1]


def test_overlap_mean_is_another_mix_than_linear(api: Running) -> None:
    body = {"ids": ["sql", "math"], "merge_strategy": "overlap_mean"}
    assert said(ask(api, merged_adapters=body))[1] != said(ask(api, "sql+math"))[1]


@pytest.mark.parametrize(
    ("model", "merged", "status", "param"),
    [
        ("sql*0.5+math*0.5", {"ids": ["sql"]}, 400, "merged_adapters"),
        ("sql", {"ids": ["math"]}, 400, "merged_adapters"),
        ("base", {"ids": []}, 400, "merged_adapters.ids"),
        ("base", {"ids": ["sql", "math"], "weights": [1.0]}, 400, "merged_adapters.weights"),
        ("base", {"ids": ["sql"], "weights": [17.0]}, 400, "merged_adapters.weights"),
        ("base", {"ids": ["nobody"]}, 404, "model"),
        ("base", {"ids": ["../etc"]}, 404, "model"),
        ("base", {"ids": ["sql"], "density": 0.2}, 400, "merged_adapters.density"),
        ("base", {"ids": ["sql"], "lambda": "2"}, 400, "merged_adapters.lambda"),
        ("base", {"ids": ["sql"] * 9}, 400, "merged_adapters"),
        ("sql*17", None, 400, "model"),
        ("sql*1e39", None, 400, "model"),
        ("+".join(f"a{i}" for i in range(9)), None, 400, "model"),
        ("sql+nobody", None, 404, "model"),
        ("sql:7", None, 404, "model"),
        ("sql*", None, 400, "model"),
    ],
)
def test_what_cannot_be_a_mix_is_refused(
    api: Running, model: str, merged: dict[str, Any] | None, status: int, param: str
) -> None:
    reply = ask(api, model, **({"merged_adapters": merged} if merged is not None else {}))
    assert (reply.status_code, reply.json()["error"]["param"]) == (status, param), reply.text


def test_an_unknown_method_is_told_what_exists(api: Running) -> None:
    reply = ask(api, merged_adapters={"ids": ["sql", "math"], "merge_strategy": "ties"})
    assert reply.status_code == 400
    error = reply.json()["error"]
    assert error["code"] == "unknown_merge_method"
    assert error["param"] == "merged_adapters.merge_strategy"
    assert "linear" in error["message"]
    assert "overlap_mean" in error["message"]


def test_holds_are_given_back_also_by_requests_that_fail(api: Running) -> None:
    ask(api, "sql+math", max_tokens=1_000_000)
    ask(api, "sql*17")
    ask(api, "sql", stop=["a"] * 9)
    assert len(api.services.catalog._holds) == 0
