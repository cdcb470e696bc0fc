"""Clients that send too much, too slowly or never: bounded, and the others are still served."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.api.running import Running, running
from tests.api.sockets import connected, drip, head, post, read_reply, read_to_end

LIMITS = {
    "json_bytes": 10_000,
    "adapter_bytes": 200_000,
    "header_seconds": 1.0,
    "json_body_seconds": 2.0,
    "body_gap_seconds": 1.0,
    "upload_seconds": 2.0,
    "connections": 40,
    "write_stall_seconds": 1.0,
    "keep_alive_seconds": 1.0,
}


@pytest.fixture(scope="module")
def tight(api_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """A server that is impatient."""
    with running(api_base, tmp_path_factory.mktemp("tight"), LIMITS) as server:
        yield server


def healthy(server: Running) -> None:
    """A client that behaves is answered, and quickly."""
    start = time.monotonic()
    answer = server.client().completions.create(model="base", prompt="x", max_tokens=1)
    assert answer.choices
    assert time.monotonic() - start < 5


def test_a_body_that_is_declared_too_large_is_not_read(tight: Running) -> None:
    with connected(tight.url) as connection:
        length = 10**12
        connection.sendall(
            head(
                "POST",
                "/v1/completions",
                tight.key,
                content_type="application/json",
                content_length=length,
            )
        )
        status, body = read_reply(connection)
    assert status == 413
    assert b"request_too_large" in body
    healthy(tight)


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/adapters?name=a"])
def test_a_body_of_unknown_length_is_cut_at_the_limit(tight: Running, path: str) -> None:
    sent = 0

    def endless() -> Iterator[bytes]:
        nonlocal sent
        while sent < 50_000_000:
            sent += 50_000
            yield b" " * 50_000

    kind = "application/json" if "completions" in path else "application/octet-stream"
    with tight.http() as http:
        reply = http.post(path, content=endless(), headers={"content-type": kind})
    assert reply.status_code == 413
    assert reply.json()["error"]["code"] == "request_too_large"
    spool = tight.services.settings.data_dir / "store" / "spool"
    assert list(spool.iterdir()) == []
    healthy(tight)


def test_a_file_in_a_form_is_cut_at_the_limit(tight: Running) -> None:
    with tight.http() as http:
        reply = http.post("/v1/adapters", data={"name": "a"}, files={"file": b"x" * 200_001})
        assert reply.status_code == 413
        # just below it is the file that is at fault
        reply = http.post("/v1/adapters", data={"name": "a"}, files={"file": b"x" * 200_000})
        assert reply.status_code == 422


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/adapters?name=a"])
@pytest.mark.parametrize("dripping", [True, False])
def test_a_slow_body_is_given_up(tight: Running, path: str, dripping: bool) -> None:
    kind = "application/json" if "completions" in path else "application/octet-stream"
    with connected(tight.url) as connection:
        connection.sendall(
            head("POST", path, tight.key, content_type=kind, content_length=5000) + b"{"
        )
        start = time.monotonic()
        if dripping:
            drip(connection, b" " * 1000, 10)
        status, _ = read_reply(connection)
        assert status == 408
        assert time.monotonic() - start < 8
    healthy(tight)


@pytest.mark.parametrize(
    "beginning", [b"", b"\r\n", b"GET /health/live HT", b"GET / HTTP/1.1\r\na: "]
)
def test_a_slow_head_is_given_up(tight: Running, beginning: bytes) -> None:
    with connected(tight.url) as connection:
        connection.sendall(beginning)
        start = time.monotonic()
        drip(connection, b"x" * 1000, 10)
        assert read_to_end(connection).startswith((b"HTTP/1.1 408", b"HTTP/1.1 400", b""))
        assert time.monotonic() - start < 6


def test_a_kept_connection_is_closed_when_nothing_comes(tight: Running) -> None:
    request = head("GET", "/health/live", "")
    for afterwards in (b"", b"\r\n", b"GET / HT"):
        with connected(tight.url) as connection:
            connection.sendall(request)
            assert read_reply(connection)[0] == 200
            start = time.monotonic()
            connection.sendall(afterwards)
            read_to_end(connection)
            assert time.monotonic() - start < 6


def test_requests_in_a_row_on_one_connection_are_all_answered(tight: Running) -> None:
    request = head("GET", "/health/live", "")
    with connected(tight.url) as connection:
        connection.sendall(request * 3)
        received = b""
        while received.count(b'{"status":"ok"}') < 3:
            received += connection.recv(65536)
        for _ in range(3):
            time.sleep(0.6)
            connection.sendall(request)
            assert read_reply(connection)[0] == 200


@pytest.mark.parametrize(
    "headers",
    [b"a: " + b"x" * 100_000, b"a: b\r\n" * 5000, b"\r\n".join(b"h%d:" % i for i in range(200))],
)
def test_headers_are_bounded(tight: Running, headers: bytes) -> None:
    with connected(tight.url) as connection:
        try:
            connection.sendall(b"GET /health/live HTTP/1.1\r\nhost: x\r\n" + headers + b"\r\n\r\n")
        except OSError:
            return  # closed before all of it was sent
        assert read_to_end(connection).startswith((b"HTTP/1.1 431", b""))
    healthy(tight)


@pytest.mark.parametrize(
    "noise",
    [
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc",
        b"GET /\xff\xfe HTTP/1.1\r\nhost: x\r\n\r\n",
        b"CONNECT a:1 HTTP/1.1\r\nhost: x\r\n\r\n",
        b"GET http://[::1 HTTP/1.1\r\nhost: x\r\n\r\n",
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
        b"GET / HTTP/1.1\r\nhost: x\r\nupgrade: h2c\r\nconnection: upgrade\r\n\r\n",
        b"GET / HTTP/1.1\r\nhost: x\r\nupgrade: websocket\r\nconnection: upgrade\r\n\r\n",
        b"POST / HTTP/1.1\r\nhost: x\r\ncontent-length: -1\r\n\r\n",
        b"POST / HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\nzz\r\n",
        b"POST / HTTP/1.1\r\ncontent-length: 3\r\ntransfer-encoding: chunked\r\n\r\n0\r\n\r\n",
        b"POST / HTTP/1.1\r\nhost: x\r\ncontent-length: 3\r\ncontent-length: 4\r\n\r\nabc",
    ],
)
def test_what_is_no_http_is_closed(tight: Running, noise: bytes) -> None:
    with connected(tight.url) as connection:
        connection.sendall(noise)
        received = read_to_end(connection)
    assert received.startswith((b"HTTP/1.1 400", b"HTTP/1.1 401", b"HTTP/1.1 408")) or not received
    healthy(tight)


def test_connections_are_bounded_and_come_free_again(tight: Running) -> None:
    with ExitStack() as stack:
        for _ in range(60):
            stack.enter_context(connected(tight.url))
        time.sleep(0.3)
        assert len(tight.server.server_state.connections) <= LIMITS["connections"] + 1
    deadline = time.monotonic() + 5
    while tight.server.server_state.connections and time.monotonic() < deadline:
        time.sleep(0.05)
    healthy(tight)


def test_a_reader_that_stalls_is_cut_off(tight: Running) -> None:
    """Its own connection and its rows; the others go on."""
    body = {
        "model": "base",
        "prompt": ["x"] * 16,
        "max_tokens": 900,
        "stream": True,
        "ignore_eos": True,
        "logprobs": 20,
    }
    engine = tight.services.engine
    # Accepted connections inherit it; otherwise the kernel takes megabytes before anybody stalls.
    tight.server._listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 16384)
    with connected(tight.url) as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.sendall(post("/v1/completions", tight.key, body))
        deadline = time.monotonic() + 60
        while not engine.stats().running and time.monotonic() < deadline:
            time.sleep(0.01)
        while engine.stats().running and time.monotonic() < deadline:
            time.sleep(0.05)
        assert engine.stats().running == 0
        received = len(read_to_end(connection))
    assert received < 1_000_000
    assert tight.services.admission.inside == 0
    healthy(tight)


def test_a_healthy_client_is_served_while_others_misbehave(tight: Running) -> None:
    stop = threading.Event()

    def misbehave(number: int) -> None:
        while not stop.is_set():
            try:
                with connected(tight.url) as connection:
                    if number % 2:
                        drip(connection, b"GET / HTTP/1.1\r\n" + b"a" * 50, 3)
                    else:
                        connection.sendall(
                            head("POST", "/v1/completions", tight.key, content_length=9000)
                        )
                        drip(connection, b" " * 50, 3)
            except OSError:
                time.sleep(0.05)

    threads = [threading.Thread(target=misbehave, args=(i,)) for i in range(16)]
    for thread in threads:
        thread.start()
    try:
        for _ in range(10):
            healthy(tight)
            time.sleep(0.1)
    finally:
        stop.set()
        for thread in threads:
            thread.join()
