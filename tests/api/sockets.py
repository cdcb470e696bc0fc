"""Clients that do not behave: raw bytes on a socket, as slowly as one likes."""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from urllib.parse import urlsplit


@contextmanager
def connected(url: str, timeout: float = 30) -> Iterator[socket.socket]:
    """A connection to the server."""
    parts = urlsplit(url)
    address = (parts.hostname or "127.0.0.1", parts.port or 80)
    with socket.create_connection(address, timeout=timeout) as connection:
        yield connection


def head(method: str, path: str, key: str, **headers: str | int) -> bytes:
    """The head of a request."""
    lines = [f"{method} {path} HTTP/1.1", "host: x", f"authorization: Bearer {key}"]
    lines += [f"{name.replace('_', '-')}: {value}" for name, value in headers.items()]
    return "\r\n".join(lines).encode() + b"\r\n\r\n"


def post(path: str, key: str, body: Any) -> bytes:
    """A whole POST of JSON."""
    data = json.dumps(body).encode()
    return head("POST", path, key, content_type="application/json", content_length=len(data)) + data


def read_to_end(connection: socket.socket) -> bytes:
    """All bytes until the server closes; a reset counts as the end."""
    received = b""
    try:
        while data := connection.recv(65536):
            received += data
    except ConnectionResetError:
        pass
    return received


def read_reply(connection: socket.socket) -> tuple[int, bytes]:
    """The status and the body of one reply that has a content-length."""
    received = b""
    while b"\r\n\r\n" not in received:
        data = connection.recv(65536)
        if not data:
            raise ConnectionError(f"closed after {received!r}")
        received += data
    first, _, body = received.partition(b"\r\n\r\n")
    lines = first.decode("latin-1").split("\r\n")
    headers = dict(line.lower().split(": ", 1) for line in lines[1:])
    while len(body) < int(headers.get("content-length", 0)):
        body += connection.recv(65536)
    return int(lines[0].split(" ")[1]), body


def drip(connection: socket.socket, data: bytes, seconds: float, gap: float = 0.1) -> float:
    """Send `data` byte by byte; how long until the server closed, or `seconds` if it did not."""
    start = time.monotonic()
    connection.settimeout(gap)
    for byte in data:
        try:
            connection.sendall(bytes([byte]))
            if connection.recv(1, socket.MSG_PEEK) is not None:
                break
        except TimeoutError:
            pass
        except OSError:
            break
        if time.monotonic() - start > seconds:
            break
    connection.settimeout(30)
    return time.monotonic() - start
