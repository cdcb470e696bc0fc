"""Running the migrations from within the program; the wheel carries them, no alembic.ini is needed.

Revisions are numbered `0001`, `0002`, … and only go up: an older release refuses a newer database
instead of downgrading it.
"""

from __future__ import annotations

import threading
from pathlib import Path

import sqlalchemy as sa
from alembic import command
from alembic.config import Config
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory

from gossamer.store.catalog.errors import RegistryTooNew

MIGRATIONS = Path(__file__).parent / "migrations"

#: alembic's `op` and `context` are process-wide, so one thread at a time
_alembic = threading.Lock()

#: names the advisory lock that upgrades of one PostgreSQL database share; any constant will do
_PG_LOCK = 0x676F7373


def upgrade(connection: sa.Connection, revision: str = "head") -> None:
    """Upgrade the schema inside the caller's transaction (which must exclude other writers).

    Raises:
        RegistryTooNew
    """
    with _alembic:
        if connection.dialect.name == "postgresql":
            connection.execute(sa.select(sa.func.pg_advisory_xact_lock(_PG_LOCK)))
        found = MigrationContext.configure(connection).get_current_revision()
        config = configuration()
        script = ScriptDirectory.from_config(config)
        if found is not None and found not in {s.revision for s in script.walk_revisions()}:
            raise RegistryTooNew(found)
        if found == (script.get_current_head() if revision == "head" else revision):
            return
        config.attributes["connection"] = connection
        command.upgrade(config, revision)


def configuration() -> Config:
    """Alembic's configuration, pointing at the migrations in this package."""
    config = Config()
    config.set_main_option("script_location", str(MIGRATIONS))
    config.set_main_option("path_separator", "os")
    return config
