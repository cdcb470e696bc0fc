"""The server that `over_http` talks to: `python -m benchmarks.serving.http_server DATA BASE KEYS`.

Prints one line of JSON when it listens: its URL, and the keys of as many tenants. Every run of the
job takes another tenant, so that none finds the prompts' keys and values of the run before.
"""

from __future__ import annotations

import json
import logging
import sys
from pathlib import Path

from gossamer.api.serve import Listening, Server, listen
from gossamer.api.services import build
from gossamer.api.settings import Settings


def main() -> None:
    """Serve until SIGTERM."""
    data, base, count = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
    logging.basicConfig(level=logging.ERROR)  # its own end is no news
    settings = Settings(data_dir=data, base=base, port=0)
    services = build(settings)
    keys = []
    for number in range(count):
        services.catalog.create_tenant(f"tenant-{number}")
        keys.append(services.store.keys.create(f"tenant-{number}").text)

    def tell(listening: Listening) -> None:
        model = services.base.name
        print(json.dumps({"url": listening.url, "keys": keys, "model": model}), flush=True)

    with listen(settings.host, settings.port) as listener:
        Server(services, listener, tell).run(sockets=[listener])


if __name__ == "__main__":
    main()
