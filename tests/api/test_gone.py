"""A client that goes away frees its rows, its pages and its place within a second."""

from __future__ import annotations

import time
from typing import Any

import pytest

from tests.api.running import Running
from tests.api.sockets import connected, head, post

BODIES: dict[str, tuple[str, dict[str, Any]]] = {
    "stream": ("/v1/completions", {"prompt": "x", "stream": True}),
    "plain": ("/v1/completions", {"prompt": "x"}),
    "many prompts": ("/v1/completions", {"prompt": ["x"] * 100, "n": 2}),
    "chat stream": (
        "/v1/chat/completions",
        {"messages": [{"role": "user", "content": "x"}], "stream": True},
    ),
    "chat": ("/v1/chat/completions", {"messages": [{"role": "user", "content": "x"}]}),
}


def wait_for(what: Any, seconds: float = 20) -> float:
    start = time.monotonic()
    while not what():
        assert time.monotonic() - start < seconds
        time.sleep(0.005)
    return time.monotonic() - start


@pytest.mark.parametrize("name", BODIES)
def test_a_client_that_hangs_up_frees_everything(api: Running, name: str) -> None:
    path, body = BODIES[name]
    body = {"model": "sql", "max_tokens": 900, "ignore_eos": True, **body}
    engine, admission = api.services.engine, api.services.admission
    key = api.new_key("leaver")
    if not api.services.catalog.list("leaver"):
        api.upload("sql", 41, key)
    with connected(api.url) as connection:
        connection.sendall(post(path, key, body))
        wait_for(lambda: engine.stats().running)
        time.sleep(0.2)
        assert engine.stats().running
        assert len(api.services.catalog._holds) == 1
    gone = wait_for(lambda: not engine.stats().running and not engine.stats().waiting)
    gone += wait_for(lambda: not admission.inside and not len(api.services.catalog._holds))
    assert gone < 1.0
    assert admission.waiting == 0


def test_a_client_that_hangs_up_amid_its_body_leaves_nothing(api: Running) -> None:
    spool = api.services.settings.data_dir / "store" / "spool"
    for path, kind in (
        ("/v1/completions", "application/json"),
        ("/v1/adapters?name=half", "application/octet-stream"),
    ):
        with connected(api.url) as connection:
            connection.sendall(
                head("POST", path, api.key, content_type=kind, content_length=10_000_000)
                + b" " * 3_000_000
            )
            time.sleep(0.2)
        wait_for(lambda: not list(spool.iterdir()), 2)
    wait_for(lambda: not api.services.admission._uploads, 2)
    assert api.client().completions.create(model="base", prompt="x", max_tokens=1)


def test_a_client_that_hangs_up_amid_a_download_leaves_no_hold(api: Running) -> None:
    with connected(api.url) as connection:
        connection.sendall(head("GET", "/v1/adapters/sql/content", api.key))
        connection.recv(100)
    wait_for(lambda: not len(api.services.catalog._holds), 5)


def test_who_goes_away_is_counted(api: Running) -> None:
    def count() -> float:
        value = api.services.metrics.registry.get_sample_value("gossamer_cancelled_requests_total")
        return value or 0.0

    before = count()
    with connected(api.url) as connection:
        connection.sendall(
            post("/v1/completions", api.key, {"model": "base", "prompt": "x", "max_tokens": 900})
        )
        wait_for(lambda: api.services.engine.stats().running)
    wait_for(lambda: count() == before + 1, 2)
