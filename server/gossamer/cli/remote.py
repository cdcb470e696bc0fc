"""A server over HTTP, with its errors in the three lines of a command."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Self
from urllib.parse import quote

import httpx

from gossamer.cli.errors import CommandError

#: Of silence, in seconds: a server may wait 30 s for room and 60 s for the first token.
_SILENCE = 120.0
_UNAVAILABLE = 503


class Unavailable(CommandError):
    """The server does not answer, or says that it cannot at the moment: it may be starting anew."""


class Server:
    """The API of one server. Use it as a context.

    Every method raises `CommandError` when the server cannot be reached or refuses; where that may
    be over in a moment it is an `Unavailable`.
    """

    def __init__(self, url: str, key: str) -> None:
        self.url = url.rstrip("/").removesuffix("/v1")
        headers = {"authorization": f"Bearer {key}"} if key else {}
        try:
            headers["authorization"].encode("ascii") if key else None
            self._client = httpx.Client(
                base_url=self.url,
                headers=headers,
                timeout=httpx.Timeout(_SILENCE, connect=10.0),
                # its address was given; a proxy of the environment is for other addresses
                trust_env=False,
            )
        except (httpx.InvalidURL, UnicodeError, ValueError) as error:
            raise CommandError(
                "The server's address or the key cannot be used.",
                str(error),
                "An address is like http://127.0.0.1:8000, a key is like sk-….",
            ) from error

    def call(self, method: str, path: str, **options: Any) -> dict[str, Any]:
        """A request; its reply's JSON object."""
        with self.stream(method, path, **options) as reply:
            try:
                reply.read()
                answer: dict[str, Any] = reply.json()
            except ValueError as error:
                raise self._not_ours() from error
            return answer

    def pages(self, path: str, after: str | None = None, **query: Any) -> Iterator[dict[str, Any]]:
        """The items of a list behind the one of the id `after`, page by page as they are wanted."""
        while True:
            cursor = {} if after is None else {"after": after}
            page = self.call("GET", path, params=query | cursor)
            yield from page["data"]
            if not page["has_more"] or not page["data"]:
                return
            after = page["data"][-1]["id"]

    @contextmanager
    def stream(self, method: str, path: str, **options: Any) -> Iterator[httpx.Response]:
        """A request whose reply is read piece by piece inside the block."""
        try:
            with self._client.stream(method, path, **options) as reply:
                if reply.is_error:
                    reply.read()
                    raise self._refused(reply)
                yield reply
        except (httpx.TransportError, httpx.UnsupportedProtocol) as error:
            raise Unavailable(
                f"The server at {self.url} did not answer.",
                str(error) or type(error).__name__,
                "Start one with `gossamer up`, or give its address with --url or GOSSAMER_URL.",
            ) from error

    def events(self, path: str, body: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
        """The events of a stream, until its `[DONE]`."""
        with self.stream("POST", path, json=dict(body)) as reply:
            for line in reply.iter_lines():
                data = line.removeprefix("data:").strip()
                if not line.startswith("data:") or not data:
                    continue
                if data == "[DONE]":
                    return
                event: dict[str, Any] = json.loads(data)
                if "error" in event:
                    raise _stopped(event["error"])
                yield event
        raise CommandError(
            "The answer broke off.", "The stream ended without its end mark.", "Try again."
        )

    def close(self) -> None:
        """Close the connections."""
        self._client.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _refused(self, reply: httpx.Response) -> CommandError:
        try:
            error = reply.json()["error"]
            message, code = str(error["message"]), error["code"]
        except (ValueError, KeyError, TypeError):
            return self._not_ours(f"HTTP {reply.status_code}")
        remedy = _REMEDIES.get(code) or _REMEDIES.get(str(reply.status_code), "Change the request.")
        kind = Unavailable if reply.status_code == _UNAVAILABLE else CommandError
        return kind(f"The server refused it ({reply.status_code}).", message, remedy)

    def _not_ours(self, why: str = "The reply is not JSON.") -> CommandError:
        return CommandError(
            f"{self.url} does not answer like a gossamer server.",
            why,
            "Give the address that `gossamer up` prints, with --url or GOSSAMER_URL.",
        )


def ref_path(ref: str) -> str:
    """A reference to an adapter as it stands in a path of the API."""
    return quote(ref, safe="/:@")


def segment(text: str) -> str:
    """A text that is one segment of a path of the API, whatever is in it."""
    return quote(text, safe="")


def _stopped(error: Any) -> CommandError:
    message = error.get("message", "") if isinstance(error, dict) else str(error)
    code = error.get("code") if isinstance(error, dict) else None
    return CommandError(
        "The server broke the answer off.", str(message), _REMEDIES.get(code or "", "Try again.")
    )


#: By the error's code, else by its status.
_REMEDIES: dict[str | None, str] = {
    "invalid_api_key": "Give a key with --key or GOSSAMER_API_KEY; "
    "`gossamer keys create` on the server makes one.",
    "model_not_found": "`gossamer adapters ls` lists what there is; `base` is the base model.",
    "base_model_mismatch": "Use a server with the base model that the adapter was made for.",
    "current_version": "Roll back to another version first, or remove the whole adapter.",
    "context_length_exceeded": "Shorten the prompt or ask for fewer tokens.",
    "adapter_corrupt": "Push the same file again.",
    "no_increment": "Pull the whole version; it needs no parent.",
    "quota_exceeded": "Delete adapters or files that are no longer needed.",
    "job_not_found": "`gossamer jobs ls` lists what there is.",
    "invalid_job_state": "`gossamer jobs show` tells how far it is.",
    "unusable_file": "Give a file of this machine; it is uploaded first.",
    "insufficient_quota": "Wait until a job is finished, or end one with `gossamer jobs cancel`.",
    "422": "Make the file anew for this base model; docs/format.md says what is in it.",
    "413": "Make it smaller, or raise the server's limit.",
    "429": "Wait a moment and try again.",
    "500": "Look into the server's log.",
    "503": "Wait a moment and try again.",
    "507": "Make room on the server's disk.",
}
