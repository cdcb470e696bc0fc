"""`gossamer up`: run the server."""

from __future__ import annotations

import os
from contextlib import ExitStack
from typing import TYPE_CHECKING, Annotated

import typer

from gossamer.cli.errors import CommandError
from gossamer.cli.options import AsJson, Base, DataDir, Port, Threads, load_settings, parse_size
from gossamer.cli.output import Output
from gossamer.cli.supervising import Supervised, worker_of

if TYPE_CHECKING:
    from gossamer.api.serve import Listening
    from gossamer.api.settings import Settings


def up(
    base: Base = None,
    host: Annotated[
        str | None,
        typer.Option(
            metavar="ADDRESS",
            help="Address to listen on.  [env var: GOSSAMER_HOST; default: 127.0.0.1]",
        ),
    ] = None,
    port: Port = None,
    data_dir: DataDir = None,
    device: Annotated[
        str | None,
        typer.Option(
            metavar="auto|cpu|cuda",
            help="What the base runs on.  "
            "[env var: GOSSAMER_DEVICE; default: auto, a GPU if there is one]",
        ),
    ] = None,
    dtype: Annotated[
        str | None,
        typer.Option(
            metavar="auto|float32|bfloat16|float16",
            help="What the base runs in.  [env var: GOSSAMER_DTYPE; default: auto, float32 on a "
            "CPU and 16 bits on a GPU]",
        ),
    ] = None,
    attention: Annotated[
        str | None,
        typer.Option(
            metavar="triton|flashinfer",
            help="Whose attention runs prompts on a GPU; flashinfer is an extra.  "
            "[env var: GOSSAMER_ATTENTION; default: triton]",
        ),
    ] = None,
    memory: Annotated[
        str | None,
        typer.Option(
            metavar="SIZE",
            help="For KV pages and adapters together, like 4GiB.  "
            "[env var: GOSSAMER_MEMORY_BYTES; default: 4GiB on a CPU, on a GPU nine tenths of what "
            "the base leaves free]",
        ),
    ] = None,
    threads: Threads = None,
    fuse_share: Annotated[
        float | None,
        typer.Option(
            metavar="SHARE",
            min=0.01,
            max=1.0,
            help="Fuse a mix that this share of the rows wants and hold the others back meanwhile, "
            "never for long; 1 holds nobody back.  [env var: GOSSAMER_FUSE_SHARE; default: 1]",
        ),
    ] = None,
    fuse_16bit: Annotated[
        bool | None,
        typer.Option(
            "--fuse-16bit",
            help="Fuse into 16-bit weights too, which rounds; only mixes that it changes little.  "
            "[env var: GOSSAMER_FUSE_16BIT]",
            show_default=False,
        ),
    ] = None,
    with_worker: Annotated[
        bool,
        typer.Option(
            "--with-worker",
            help="Carry out training jobs too, in a second process with its own copy of the base.",
        ),
    ] = False,
    worker_threads: Annotated[
        int | None,
        typer.Option(
            metavar="COUNT",
            min=1,
            help="Threads of one of its matrix products.  [default: half of the processors]",
        ),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Run the server until it is told to stop.

    Prints the address it listens on and, at the first start on a data folder, the admin key: once,
    and never again. SIGTERM or Ctrl-C lets running requests finish; a second one does not. Logs go
    to standard error, one JSON object a line; those of the worker say so in the field `from`. Every
    other setting is an environment variable (docs/api.md).
    """
    if worker_threads is not None and not with_worker:
        raise typer.BadParameter("there is no worker", param_hint="--worker-threads")
    output = Output(as_json)
    settings = load_settings(
        base=base,
        host=host,
        port=port,
        data_dir=data_dir,
        device=device,
        dtype=dtype,
        attention=attention,
        memory_bytes=None if memory is None else parse_size(memory),
        threads=threads,
        fuse_share=fuse_share,
        fuse_16bit=fuse_16bit,
    )
    output.note(f"Starting with the base model {settings.base} …")
    worker = worker_of(settings, worker_threads) if with_worker else None
    raise typer.Exit(_serve(settings, output, worker))


def _serve(settings: Settings, output: Output, worker: Supervised | None) -> int:
    from gossamer.api.logs import configure_logging
    from gossamer.api.serve import listen, serve
    from gossamer.cli.bars import base_stages
    from gossamer.store.blobs import reach

    try:
        # before the base is loaded, which takes seconds, or fetched, which takes minutes
        listen(settings.host, settings.port).close()
    except OSError as error:
        raise CommandError(
            f"The server cannot listen on {settings.host}:{settings.port}.",
            error.strerror or str(error),
            "Give another --host or --port; --port 0 takes a free one.",
        ) from error
    if settings.blobs_url is not None:
        reach(settings.blobs_url)
    configure_logging(settings.log_level)
    with ExitStack() as beside, ExitStack() as bars:
        progress = bars.enter_context(base_stages(output))

        def ready(listening: Listening) -> None:
            bars.close()
            if worker is not None:  # not before: the base is there, and the registry migrated
                beside.enter_context(worker)
            _tell(settings, listening, output)

        return serve(settings, on_ready=ready, progress=progress)


def _from_here(url: str) -> str:
    """Where this machine reaches a server that listens on all addresses."""
    return url.replace("//0.0.0.0:", "//127.0.0.1:").replace("//[::]:", "//[::1]:")


def _tell(settings: Settings, listening: Listening, output: Output) -> None:
    key = listening.first_key
    text = f"Listening on {listening.url}"
    if key is not None:
        text += (
            f"\nAdmin key of the tenant {key.info.tenant}, shown this once: {key.text}"
            "\n\nFor the other commands:"
            f"\n  export GOSSAMER_URL={_from_here(listening.url)} GOSSAMER_API_KEY={key.text}"
        )
    document = {
        "event": "listening",
        "url": listening.url,
        "base": settings.base,
        "data_dir": str(settings.data_dir.expanduser().resolve()),
        "pid": os.getpid(),
        "key": None if key is None else key.text,
        "tenant": None if key is None else key.info.tenant,
    }
    output.result(document, text)
