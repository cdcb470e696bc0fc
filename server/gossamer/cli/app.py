"""The commands, put together, and the one place that turns errors into lines and exit codes."""

from __future__ import annotations

from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from gossamer.cli import (
    adapters,
    bench,
    chat,
    doctor,
    exchange,
    exporting,
    importing,
    jobs,
    keys,
    methods,
    train,
    up,
    worker,
)
from gossamer.cli.errors import INTERRUPTED, command_error
from gossamer.cli.output import show_error


class Guarded(TyperGroup):
    """A group whose commands end with three lines where they would end with a traceback.

    What `command_error` does not know is a defect, and keeps its traceback.
    """

    def invoke(self, ctx: Any) -> Any:
        """Run the command."""
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            raise typer.Exit(INTERRUPTED) from None
        except BrokenPipeError:
            raise  # the reader has gone: nothing is left to say, and to whom
        except Exception as error:
            known = command_error(error)
            if known is None:
                raise
            show_error(known)
            raise typer.Exit(known.code) from error


def _show_version(value: bool) -> None:
    if value:
        from importlib.metadata import version

        typer.echo(version("gossamer"))
        raise typer.Exit


app = typer.Typer(
    name="gossamer",
    cls=Guarded,
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)


@app.callback()
def gossamer(
    _version: Annotated[
        bool,
        typer.Option(
            "--version", is_eager=True, callback=_show_version, help="Show the version and exit."
        ),
    ] = False,
) -> None:
    """Serve many sparse fine-tunes, and weighted merges of them, from one language model."""


app.command("up")(up.up)
app.command("chat")(chat.chat)
adapters.app.command("import")(importing.import_)
adapters.app.command("export")(exporting.export)
adapters.app.command("formats")(exchange.formats)
app.add_typer(adapters.app, name="adapters")
app.command("train")(train.train)
app.add_typer(jobs.app, name="jobs")
app.command("methods")(methods.methods)
app.command("worker")(worker.worker)
app.add_typer(keys.app, name="keys")
app.command("bench")(bench.bench)
app.command("doctor")(doctor.doctor)
