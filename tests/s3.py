"""A server that speaks S3's protocol, on localhost, for the tests of object stores."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import httpx
from moto.server import ThreadedMotoServer
from obstore.store import S3Store

KEY_ID, SECRET = "AKIATESTSTORE", "a-secret-that-nobody-may-see"


@dataclass(frozen=True)
class S3Server:
    """A running server. It takes any credentials until it is told to `demand` known ones."""

    url: str

    def environment(self) -> dict[str, str]:
        """What makes obstore talk to it."""
        return {
            "AWS_ACCESS_KEY_ID": KEY_ID,
            "AWS_SECRET_ACCESS_KEY": SECRET,
            "AWS_REGION": "us-east-1",
            "AWS_ENDPOINT_URL": self.url,
            "AWS_ALLOW_HTTP": "true",
        }

    def make_bucket(self, name: str) -> None:
        """A new empty bucket."""
        httpx.put(f"{self.url}/{name}").raise_for_status()

    def bucket(self, name: str) -> S3Store:
        """A bucket, past every layer of ours."""
        return S3Store(
            name,
            access_key_id=KEY_ID,
            secret_access_key=SECRET,
            region="us-east-1",
            endpoint=self.url,
            client_options={"allow_http": True},
        )

    def forget(self) -> None:
        """Lose all buckets."""
        httpx.post(f"{self.url}/moto-api/reset").raise_for_status()

    @contextmanager
    def demanding(self) -> Iterator[None]:
        """Refuse credentials that are nobody's, which are all: it has no users."""
        self._check_after("0")
        try:
            yield
        finally:
            self._check_after("inf")

    def _check_after(self, requests: str) -> None:
        httpx.post(f"{self.url}/moto-api/reset-auth", content=requests).raise_for_status()


@contextmanager
def serving() -> Iterator[S3Server]:
    """A server of this process, on a free port."""
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    try:
        host, port = server.get_host_and_port()
        yield S3Server(f"http://{host}:{port}")
    finally:
        server.stop()
