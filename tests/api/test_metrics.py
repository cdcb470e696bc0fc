"""Metrics: the documented names, and never more series because of what clients send."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from tests.api.running import Running

NAMES = {
    "vllm:num_requests_running",
    "vllm:num_requests_waiting",
    "vllm:kv_cache_usage_perc",
    "vllm:lora_requests_info",
    "gossamer_ready",
    "gossamer_http_requests",
    "gossamer_http_request_seconds",
    "gossamer_time_to_first_token_seconds",
    "gossamer_inter_token_seconds",
    "gossamer_prompt_tokens",
    "gossamer_completion_tokens",
    "gossamer_adapter_bytes",
    "gossamer_kv_bytes",
    "gossamer_fused_steps",
    "gossamer_fused_windows",
    "gossamer_held_row_steps",
    "gossamer_jobs",
    "gossamer_jobs_finished",
}


def families(api: Running) -> dict[str, list[tuple[str, tuple[tuple[str, str], ...], float]]]:
    with api.http("") as http:
        reply = http.get("/metrics")
    assert reply.status_code == 200
    assert reply.headers["content-type"].startswith("text/plain")
    return {
        family.name: [(s.name, tuple(sorted(s.labels.items())), s.value) for s in family.samples]
        for family in text_string_to_metric_families(reply.text)
    }


def test_the_documented_metrics_are_there_and_count(api: Running) -> None:
    before = families(api)
    assert set(before) >= NAMES
    for stream in (True, False):
        answer = api.client().completions.create(
            model="sql",
            prompt="x",
            max_tokens=40,  # a few may come in one piece, but not all
            stream=stream,
            extra_body={"ignore_eos": True},
        )
        if stream:
            list(answer)
    after = families(api)

    def grown(family: str, sample: str) -> float:
        return sum(v for n, _, v in after[family] if n == sample) - sum(
            v for n, _, v in before[family] if n == sample
        )

    assert grown("gossamer_completion_tokens", "gossamer_completion_tokens_total") == 80
    assert grown("gossamer_held_row_steps", "gossamer_held_row_steps_total") == 0
    first = "gossamer_time_to_first_token_seconds"
    assert grown(first, f"{first}_count") == 2
    between = "gossamer_inter_token_seconds"
    assert 1 <= grown(between, f"{between}_count") <= 41
    assert grown("gossamer_http_requests", "gossamer_http_requests_total") >= 2
    (sample,) = after["vllm:lora_requests_info"]
    assert set(dict(sample[1])) == {"max_lora", "running_lora_adapters", "waiting_lora_adapters"}


def test_what_clients_make_up_adds_no_series(api: Running) -> None:
    def series() -> set[tuple[str, tuple[tuple[str, str], ...]]]:
        found = families(api)
        del found["vllm:lora_requests_info"]  # one sample, whatever its labels say
        return {(name, labels) for samples in found.values() for name, labels, _ in samples}

    def make_up(number: int) -> None:
        name = f"made-up-{number}"
        headers = {"authorization": f"Bearer {api.key}"}
        with httpx.Client(base_url=api.url, headers=headers, timeout=60) as http:
            for i in range(5):
                http.post("/v1/completions", json={"model": f"{name}-{i}", "prompt": "x"})
                http.get(f"/v1/models/{name}-{i}")
                http.request(f"MADE{i}UP{number}", f"/{name}/{i}")
                http.get(f"/{name}-{i}", headers={"user-agent": name, "x-request-id": name})

    make_up(-1)
    before = series()
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(make_up, range(20)))  # 5 000 names in the gate below
    assert series() == before


@pytest.mark.gate
def test_five_thousand_made_up_names_add_no_series(api: Running) -> None:
    with api.http() as http:
        for i in range(10):
            http.post("/v1/completions", json={"model": f"warm-{i}", "prompt": "x"})
            http.get("/metrics")
        before = len(http.get("/metrics").text.splitlines())
        for i in range(5000):
            http.post("/v1/completions", json={"model": f"made-up-{i}", "prompt": "x"})
        assert len(http.get("/metrics").text.splitlines()) == before


@pytest.mark.parametrize("forwarded", ["x-forwarded-for", "forwarded", "via", "x-real-ip"])
def test_a_proxy_on_this_machine_does_not_open_the_metrics(api: Running, forwarded: str) -> None:
    with api.http("") as http:
        assert http.get("/metrics", headers={forwarded: "1.2.3.4"}).status_code == 401
    with api.http(api.new_key()) as http:
        assert http.get("/metrics", headers={forwarded: "1.2.3.4"}).status_code == 403
    with api.http() as http:
        assert http.get("/metrics", headers={forwarded: "1.2.3.4"}).status_code == 200
