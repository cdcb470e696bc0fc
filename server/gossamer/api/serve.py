"""Running the server: uvicorn, the signals, and the drain at the end."""

from __future__ import annotations

import asyncio
import logging
import signal
import socket
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from types import FrameType

import uvicorn
from fastapi import FastAPI

from gossamer.api.app import create_app
from gossamer.api.logs import configure_logging
from gossamer.api.protocol import bounded
from gossamer.api.services import Services, build
from gossamer.api.settings import Settings
from gossamer.base.fetch import Progress
from gossamer.store.keys import NewKey

logger = logging.getLogger(__name__)

#: what uvicorn may take to flush the last answers, after the engine has drained
_LAST_WRITES = 5
_ENDED, _FAILED = 0, 3


@dataclass(frozen=True)
class Listening:
    """The server answers at `url`. `first_key` is there at the very first start only."""

    url: str
    first_key: NewKey | None


OnReady = Callable[[Listening], None]


def serve(
    settings: Settings, *, on_ready: OnReady | None = None, progress: Progress | None = None
) -> int:
    """Run the server until SIGTERM or SIGINT and return the exit code: 0 after an orderly end, 3
    when it could not start. From then on the process logs JSON lines to standard error.

    At the first signal the server drains: it is not ready any more, answers new requests with a 503
    that says when to come again, and lets running ones finish for `settings.drain_seconds`; streams
    still open then end with an error event. A second signal skips the rest of the drain.

    Args:
        on_ready: called once, in the event loop, when requests are accepted.
        progress: of fetching and converting the base.

    Raises:
        OSError: the address cannot be listened on.
        what `gossamer.api.services.build` raises.
    """
    configure_logging(settings.log_level)
    with listen(settings.host, settings.port) as listener:
        server = Server(build(settings, progress=progress), listener, on_ready)
        try:
            server.run(sockets=[listener])
        except SystemExit:  # how uvicorn ends when the application does not start
            return _FAILED
    return _ENDED


def listen(host: str, port: int) -> socket.socket:
    """A socket bound to the address; it accepts nothing yet."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    return socket.create_server((host, port), family=family, backlog=2048)


class Server(uvicorn.Server):
    """uvicorn with a drain before its shutdown. `app` is the application that it runs."""

    def __init__(
        self, services: Services, listener: socket.socket, on_ready: OnReady | None = None
    ) -> None:
        self.app: FastAPI = create_app(services)
        self._services = services
        self._listener = listener
        self._on_ready = on_ready
        self._endings: list[asyncio.Task[None]] = []
        self._loop: asyncio.AbstractEventLoop | None = None
        limits = services.settings.limits
        super().__init__(
            uvicorn.Config(
                self.app,
                loop="uvloop",
                http=bounded(limits),
                ws="none",
                lifespan="on",
                log_config=None,
                access_log=False,
                proxy_headers=False,
                server_header=False,
                timeout_keep_alive=int(limits.keep_alive_seconds),
                timeout_graceful_shutdown=_LAST_WRITES,
            )
        )

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """As uvicorn's; then tell whoever started us."""
        self._loop = asyncio.get_running_loop()
        await super().startup(sockets)
        if self._on_ready is not None:
            host, port = self._listener.getsockname()[:2]
            shown = f"[{host}]" if ":" in host else host
            self._on_ready(Listening(f"http://{shown}:{port}", self.app.state.first_key))

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """A signal: begin to drain; at the second one stop at once."""
        # uvicorn would raise the signal again at its end, and the process would die of it.
        del frame
        logger.warning("received %s", signal.Signals(sig).name)
        self.drain()

    def drain(self) -> None:
        """Begin the drain, or end it when it has begun. From any thread."""
        if self._loop is not None:
            self._loop.call_soon_threadsafe(self._drain_or_stop)
        else:
            self.should_exit = True

    def _drain_or_stop(self) -> None:
        end = self._services.engine.close
        if not self._services.lifecycle.draining:
            self._services.lifecycle.draining = True
            end = partial(self._services.engine.drain, self._services.settings.drain_seconds)
        self._endings.append(asyncio.get_running_loop().create_task(self._end(end)))

    async def _end(self, end: Callable[[], None]) -> None:
        await asyncio.to_thread(end)
        self.should_exit = True
