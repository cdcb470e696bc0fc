"""`gossamer keys`: the API keys of a data folder, on the server's own machine."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from gossamer.cli.options import AsJson, DataDir, load_settings
from gossamer.cli.output import Output, table

if TYPE_CHECKING:
    from gossamer.store.keys import KeyInfo, KeyRing
    from gossamer.store.registry.database import Registry

app = typer.Typer(
    help="API keys. These commands work on the data folder; the server need not run.",
    no_args_is_help=True,
)

_UNITS = {"m": "minutes", "h": "hours", "d": "days", "w": "weeks"}


@app.command()
def create(
    tenant: Annotated[
        str, typer.Option(metavar="NAME", help="Whose requests it is for.")
    ] = "default",
    scope: Annotated[
        Literal["user", "admin"], typer.Option(help="An admin key may also read /metrics.")
    ] = "user",
    label: Annotated[str, typer.Option(metavar="TEXT", help="What you call it.")] = "",
    expires: Annotated[
        str | None,
        typer.Option(metavar="TIME", help="When it ends, from now: 30m, 12h, 90d or 8w."),
    ] = None,
    new_tenant: Annotated[
        bool, typer.Option("--new-tenant", help="Make the tenant if there is none of that name.")
    ] = False,
    data_dir: DataDir = None,
    as_json: AsJson = False,
) -> None:
    """Make a key and show it, once: only its checksum is kept."""
    from gossamer.store.catalog.names import check_name
    from gossamer.store.registry.tenants import ensure_tenant

    output = Output(as_json)
    now = datetime.now(UTC)
    expires_at = None if expires is None else now + parse_duration(expires)
    check_name(tenant)
    with _opened(data_dir) as (registry, ring):
        if new_tenant:
            with registry.write() as session:
                ensure_tenant(session, tenant, now)
        made = ring.create(tenant, scope, label=label, expires_at=expires_at)
    document = {**_document(made.info), "key": made.text}
    text = f"{made.text}\nKey {made.info.key_id} of the tenant {tenant}, shown this once."
    output.result(document, text)


@app.command("ls")
def list_(
    tenant: Annotated[str | None, typer.Option(metavar="NAME", help="Of this tenant only.")] = None,
    data_dir: DataDir = None,
    as_json: AsJson = False,
) -> None:
    """List keys by age, the revoked and expired ones too. The secrets are kept nowhere."""
    output = Output(as_json)
    with _opened(data_dir) as (_, ring):
        found = ring.list(tenant)
    if not found:
        output.note("There are no keys; the server makes the first one when it starts.")
    head = ("ID", "TENANT", "SCOPE", "STATE", "CREATED", "EXPIRES", "LABEL")
    rows = [
        (
            key.key_id,
            key.tenant,
            key.scope,
            _state(key),
            _time(key.created_at),
            _time(key.expires_at),
            key.label,
        )
        for key in found
    ]
    output.result([_document(key) for key in found], table(head, rows) if rows else "")


@app.command()
def revoke(
    key_id: Annotated[str, typer.Argument(metavar="ID", help="The id that `keys ls` shows.")],
    data_dir: DataDir = None,
    as_json: AsJson = False,
) -> None:
    """End a key: requests that come after this are refused. A whole key is taken for its id."""
    match = re.fullmatch(r"sk-([0-9a-f]+)-.*", key_id)
    key_id = match[1] if match else key_id
    with _opened(data_dir) as (_, ring):
        ring.revoke(key_id)
    Output(as_json).result({"id": key_id, "revoked": True}, f"Key {key_id} is revoked.")


def parse_duration(text: str) -> timedelta:
    """`30m`, `12h`, `90d`, `8w`.

    Raises:
        typer.BadParameter
    """
    match = re.fullmatch(r"([1-9][0-9]{0,5})([mhdw])", text.strip())
    if match is None:
        raise typer.BadParameter(f"{text!r} is not a time; write 30m, 12h, 90d or 8w")
    return timedelta(**{_UNITS[match[2]]: int(match[1])})


@contextmanager
def _opened(data_dir: Any) -> Iterator[tuple[Registry, KeyRing]]:
    from gossamer.store.catalog.opening import open_keys, open_registry

    settings = load_settings(data_dir=data_dir)
    data = settings.data_dir.expanduser().resolve()
    registry = open_registry(data, settings.database_url)
    try:
        yield registry, open_keys(data, registry)
    finally:
        registry.close()


def _state(key: KeyInfo) -> str:
    if key.revoked_at is not None:
        return "revoked"
    expired = key.expires_at is not None and key.expires_at <= datetime.now(UTC)
    return "expired" if expired else "active"


def _document(key: KeyInfo) -> dict[str, Any]:
    return {
        "id": key.key_id,
        "tenant": key.tenant,
        "scope": key.scope,
        "state": _state(key),
        "label": key.label,
        "created_at": int(key.created_at.timestamp()),
        "expires_at": None if key.expires_at is None else int(key.expires_at.timestamp()),
        "revoked_at": None if key.revoked_at is None else int(key.revoked_at.timestamp()),
    }


def _time(moment: datetime | None) -> str:
    return "never" if moment is None else moment.astimezone().strftime("%Y-%m-%d %H:%M")
