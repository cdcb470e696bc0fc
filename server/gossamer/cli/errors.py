"""What a command says when it cannot do its work: three lines, and an exit code.

0    done
1    it could not be done: what happened, why, and what to do, on standard error
2    the command was not typed right
130  interrupted
"""

from __future__ import annotations

import sqlite3
from collections.abc import Callable
from typing import Any

FAILURE, USAGE, INTERRUPTED = 1, 2, 130


class CommandError(Exception):
    """A command failed in a way that its user can do something about.

    Attributes:
        what: happened, one line.
        why: one line.
        remedy: what to do about it, one line.
        code: the exit code.
    """

    def __init__(self, what: str, why: str, remedy: str, *, code: int = FAILURE) -> None:
        super().__init__(what, why, remedy)
        self.what, self.why, self.remedy, self.code = what, why, remedy, code

    def __str__(self) -> str:
        return "\n".join(line for line in (self.what, self.why, self.remedy) if line)


def command_error(error: BaseException) -> CommandError | None:
    """`error` in three lines, or None when it is none of those that a user can cause.

    The other rooms' errors know what happened and why; what to do about it on a command line is
    told here, in one table. Rooms are imported now, not before: only a failure needs them.
    """
    if isinstance(error, CommandError):
        return error
    if hasattr(error, "exit_code"):  # typer's own ways to end
        return None
    rows = _rows()
    row = next((rows[cls] for cls in type(error).__mro__ if cls in rows), None)
    return None if row is None else CommandError(*row(error))


Row = Callable[[Any], tuple[str, str, str]]


def _because(what: str, remedy: str) -> Row:
    return lambda error: (what, _line(str(error)), remedy)


def _rows() -> dict[type[BaseException], Row]:
    from sqlalchemy.exc import DBAPIError

    from gossamer.base.errors import ExplainedError
    from gossamer.engine.errors import UnsupportedModel
    from gossamer.jobs.errors import UnknownMethod
    from gossamer.store.errors import AdapterFileError

    return _catalog_rows() | {
        ExplainedError: lambda e: (_line(e.what), _line(e.why), _line(e.remedy)),
        AdapterFileError: lambda e: (
            "The adapter file was refused.",
            _line(e.message) + (f" (tensor {e.tensor})" if e.tensor else ""),
            "Make the file anew for this base model; docs/format.md says what is in it.",
        ),
        UnsupportedModel: lambda e: (
            f"{e.architecture} cannot be served.",
            _line(e.why),
            "Use another base model.",
        ),
        UnknownMethod: lambda e: (
            f"There is no training method {e.name!r} for this.",
            f"There are {', '.join(e.known)}.",
            "`gossamer methods` explains them.",
        ),
        DBAPIError: lambda e: (
            "The registry cannot be used.",
            _line(str(e.orig)),
            "`gossamer doctor` looks for the cause.",
        ),
        sqlite3.Error: _because(
            "The registry cannot be used.", "`gossamer doctor` looks for the cause."
        ),
        OSError: lambda e: (
            "A file or folder cannot be used.",
            _line(f"{e.filename}: {e.strerror}" if e.filename else str(e)),
            "Check the path and its permissions.",
        ),
    }


def _catalog_rows() -> dict[type[BaseException], Row]:
    from gossamer.store.catalog import errors as catalog

    return {
        catalog.TenantNotFound: lambda e: (
            f"There is no tenant {e.tenant!r}.",
            "Keys and adapters belong to a tenant that exists.",
            "Give an existing one, or let `gossamer keys create --new-tenant` make it.",
        ),
        catalog.KeyNotFound: _because("The key was not found.", "See `gossamer keys ls`."),
        catalog.InvalidName: _because("The name cannot be used.", "Use a-z, 0-9, '.', '_', '-'."),
        catalog.ReservedName: _because("The name cannot be used.", "Choose another name."),
        catalog.AlreadyOwned: _because(
            "The data folder is in use.", "Stop that server, or give another --data-dir."
        ),
        catalog.RegistryTooNew: _because(
            "The registry cannot be read.", "Upgrade gossamer, or give another --data-dir."
        ),
        catalog.RegistryBusy: _because("The registry is locked.", "Try again in a moment."),
        catalog.KeySecretUnsafe: _because(
            "The key secret cannot be used.", "Correct the file as the line above says."
        ),
        catalog.BlobStoreFailed: _because(
            "The blob store cannot be used.",
            "Check GOSSAMER_BLOBS_URL, and the credentials and endpoint in the environment.",
        ),
        catalog.BlobsNotOurs: lambda e: (
            "The blob store is not the one of this registry.",
            _line(e.why) + ".",
            "Check GOSSAMER_BLOBS_URL, GOSSAMER_DATABASE_URL and --data-dir; if they are right, "
            f"write {e.mark} into `owner` beside the folder `blobs`.",
        ),
        catalog.StoreFull: _because("The disk is full.", "Make room, then try again."),
        catalog.QuotaExceeded: _because(
            "The tenant's quota is used up.", "Delete what is no longer needed."
        ),
        catalog.CatalogError: _because(
            "The store refused it.", "`gossamer doctor` looks for the cause."
        ),
    }


def _line(text: str) -> str:
    return " ".join(text.split())
