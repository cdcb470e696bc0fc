"""A real server over a tiny base: uvicorn on a loopback port, a real catalog, real clients."""

from __future__ import annotations

import io
import ssl
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import openai

from gossamer.api.serve import Listening, Server, listen
from gossamer.api.services import Services, build
from gossamer.api.settings import Limits, Settings
from gossamer.store.catalog.views import BaseInfo
from gossamer.store.delta import Delta, DeltaSet
from gossamer.store.format import write

#: Nothing here is encrypted, and reading the certificates of the machine takes 70 ms a client.
_NO_CERTIFICATES = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)


@dataclass(frozen=True)
class Running:
    """A server that answers. `key` is its first admin key, of the tenant `default`."""

    url: str
    key: str
    server: Server
    services: Services
    opened: dict[str, openai.OpenAI] = field(default_factory=dict, repr=False)

    def unhurried(self) -> Running:
        """Have every step take 5 ms: the tiny model writes 1000 tokens in a second otherwise."""
        runner = self.services.engine._loop._runner
        run = runner.run

        def slowly(*args: Any, **kwargs: Any) -> Any:
            time.sleep(0.005)
            return run(*args, **kwargs)

        runner.run = slowly  # type: ignore[method-assign]
        return self

    def new_key(self, tenant: str = "default", **options: Any) -> str:
        """A user key of a tenant, which is made when missing."""
        if tenant not in self.services.catalog.tenants():
            self.services.catalog.create_tenant(tenant)
        return self.services.store.keys.create(tenant, **options).text

    def client(self, key: str | None = None, **options: Any) -> openai.OpenAI:
        """The real client. No retries unless asked for: a test wants the first answer."""
        values = self._options(key, options)
        # Kept and closed at the end: left to the garbage collector, a socket may go before its
        # client and warn of it.
        name = repr(sorted(values.items()))
        if name not in self.opened:
            transport = openai.DefaultHttpxClient(verify=_NO_CERTIFICATES)
            self.opened[name] = openai.OpenAI(**values, http_client=transport)
        return self.opened[name]

    def async_client(self, key: str | None = None, **options: Any) -> openai.AsyncOpenAI:
        """The real client, for asyncio."""
        transport = openai.DefaultAsyncHttpxClient(verify=_NO_CERTIFICATES)
        return openai.AsyncOpenAI(**self._options(key, options), http_client=transport)

    def _options(self, key: str | None, options: dict[str, Any]) -> dict[str, Any]:
        defaults = {"base_url": f"{self.url}/v1", "max_retries": 0, "timeout": 60}
        return {**defaults, "api_key": key or self.key, **options}

    def http(self, key: str | None = None, **options: Any) -> httpx.Client:
        """Plain HTTP with a key; `key=""` sends none."""
        key = self.key if key is None else key
        headers = {"authorization": f"Bearer {key}"} if key else {}
        return httpx.Client(
            base_url=self.url, headers=headers, timeout=60, verify=_NO_CERTIFICATES, **options
        )

    def upload(
        self, name: str, seed: int, key: str | None = None, **options: Any
    ) -> dict[str, Any]:
        """Push `make_file(…, seed, **options)` over HTTP; the version."""
        with self.http(key) as http:
            reply = http.post(
                "/v1/adapters",
                data={"name": name},
                files={"file": ("a.safetensors", self.make_file(seed, **options))},
            )
        assert reply.status_code == 201, reply.text
        version: dict[str, Any] = reply.json()
        return version

    def make_file(self, seed: int, **options: Any) -> bytes:
        """An adapter file for the server's base."""
        base = self.services.base
        info = BaseInfo(base.name, base.fingerprint, self.services.engine.table)
        return make_file(info, seed, **options)


def make_file(base: BaseInfo, seed: int, *, density: float = 0.02, scale: float = 0.3) -> bytes:
    """A packed adapter with random entries on every weight; strong enough to change the text."""
    random = np.random.default_rng(seed)
    deltas = {}
    for name, shape in base.table.items():
        size = shape[0] * shape[1]
        positions = np.sort(random.choice(size, max(1, int(size * density)), replace=False))
        values = random.normal(scale=scale, size=len(positions)).astype(np.float32)
        deltas[name] = Delta.element(shape, positions, values, value_dtype="F32")
    file = io.BytesIO()
    write(DeltaSet(base.fingerprint, base.name, deltas, {"seed": seed}), file)
    return file.getvalue()


@contextmanager
def running(
    base: Path, data_dir: Path, limits: dict[str, Any] | None = None, **settings: Any
) -> Iterator[Running]:
    """Start a server on a free port in a thread of its own; stop it in the end, in order."""
    values = {"memory_bytes": 64 << 20, "drain_seconds": 5.0, **settings}
    chosen = Settings(
        data_dir=data_dir, base=str(base), port=0, limits=Limits(**(limits or {})), **values
    )
    ready = threading.Event()
    told: list[Listening] = []

    def on_ready(listening: Listening) -> None:
        told.append(listening)
        ready.set()

    with listen(chosen.host, chosen.port) as listener:
        services = build(chosen)
        server = Server(services, listener, on_ready)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        try:
            while not ready.wait(0.1):
                assert thread.is_alive(), "the server did not start"
            key = told[0].first_key
            made = Running(told[0].url, key.text if key else "", server, services)
            yield made
            for client in made.opened.values():
                client.close()
        finally:
            if thread.is_alive():
                server.drain()
            thread.join(30)
            assert not thread.is_alive(), "the server did not stop"
