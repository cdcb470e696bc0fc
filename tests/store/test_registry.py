"""The registry: migrations from empty and from old, durability settings, waiting for writers."""

from __future__ import annotations

import io
import sqlite3
import threading
import time
from datetime import UTC, datetime, timedelta, timezone
from pathlib import Path

import pytest
import sqlalchemy as sa
from alembic import command
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy.exc import IntegrityError

from gossamer.store.catalog.errors import RegistryBusy, RegistryTooNew, StoreFull
from gossamer.store.keys import KeyRing
from gossamer.store.registry.database import Registry
from gossamer.store.registry.migrate import configuration, upgrade
from gossamer.store.registry.models import ApiKey, Model, Tenant
from tests.store.support import BASE, opened, push, race, rows

DUMPS = Path(__file__).parent / "registries"
NOW = datetime(2030, 1, 1, tzinfo=UTC)


def make(tmp_path: Path, **options: float) -> Registry:
    return Registry(f"sqlite:///{tmp_path / 'registry.sqlite3'}", **options)


def restore(dump: Path, database: Path) -> None:
    connection = sqlite3.connect(database)
    connection.executescript(dump.read_text())
    connection.close()


def revisions() -> list[str]:
    return sorted(s.revision for s in ScriptDirectory.from_config(configuration()).walk_revisions())


def test_the_migrations_make_what_the_models_say(tmp_path: Path) -> None:
    registry = make(tmp_path)
    registry.migrate()
    with registry.read() as session:
        context = MigrationContext.configure(session.connection(), opts={"compare_type": True})
        assert compare_metadata(context, Model.metadata) == []
        extra = sa.MetaData(naming_convention=Model.metadata.naming_convention)
        for table in Model.metadata.tables.values():
            table.to_metadata(extra)
        extra.tables["tenants"].append_column(sa.Column("forgotten", sa.Integer))
        assert compare_metadata(context, extra) != []  # the comparison can fail
    registry.close()


def test_migrations_are_numbered_without_gaps() -> None:
    assert revisions() == [f"{i:04}" for i in range(1, len(revisions()) + 1)]


def test_every_older_revision_has_a_stored_database() -> None:
    assert sorted(p.stem for p in DUMPS.glob("*.sql")) == revisions()


@pytest.mark.parametrize("dump", sorted(DUMPS.glob("*.sql")), ids=lambda p: p.stem)
def test_an_old_database_is_upgraded_and_keeps_what_it_holds(dump: Path, tmp_path: Path) -> None:
    restore(dump, tmp_path / "registry.sqlite3")
    registry = make(tmp_path)
    registry.migrate()
    assert rows(tmp_path, "SELECT version_num FROM alembic_version") == [(revisions()[-1],)]
    with registry.read() as session:
        context = MigrationContext.configure(session.connection())
        assert compare_metadata(context, Model.metadata) == []
    keys = KeyRing(registry, b"s" * 32)
    kept = {k.key_id: k for k in keys.list("acme")}
    assert keys.verify("sk-000000000001-" + "1" * 64).tenant == "acme"
    assert kept["000000000002"].revoked_at == NOW
    if dump.stem >= "0002":
        assert rows(tmp_path, "SELECT name, current_number FROM adapters") == [("sql", 2)]
    if dump.stem >= "0003":
        jobs = rows(tmp_path, "SELECT status, wanted, fence, version_label FROM jobs ORDER BY id")
        assert jobs == [("running", "pause", 2, None), ("succeeded", None, 1, "sql:2")]
        assert rows(tmp_path, "SELECT count(*) FROM job_events") == [(2,)]
    blobs = rows(tmp_path, "SELECT claims, moving FROM blobs ORDER BY id")
    if dump.stem in ("0002", "0003"):
        assert blobs == [(0, 0), (0, 0)]
    if dump.stem >= "0004":
        assert blobs == [(3, 0), (0, 0)]
        assert rows(tmp_path, "SELECT id FROM identity") == [("0" * 30 + "42",)]
    registry.close()


def test_an_upgraded_database_takes_uploads(tmp_path: Path) -> None:
    restore(DUMPS / "0001.sql", tmp_path / "registry.sqlite3")
    with opened(tmp_path) as store:
        push(store.catalog, "sql", 1)
        assert [a.name for a in store.catalog.list("acme")] == ["sql"]


def test_migrating_twice_changes_nothing(tmp_path: Path) -> None:
    registry = make(tmp_path)
    registry.migrate()
    before = rows(tmp_path, "SELECT sql FROM sqlite_master ORDER BY name")
    registry.migrate()
    assert rows(tmp_path, "SELECT sql FROM sqlite_master ORDER BY name") == before
    registry.close()


def test_a_failing_migration_changes_nothing(tmp_path: Path) -> None:
    restore(DUMPS / "0001.sql", tmp_path / "registry.sqlite3")
    connection = sqlite3.connect(tmp_path / "registry.sqlite3")
    connection.execute("CREATE TABLE versions (in_the_way INTEGER)")
    connection.close()
    before = rows(tmp_path, "SELECT name FROM sqlite_master ORDER BY name")
    registry = make(tmp_path)
    with pytest.raises(sa.exc.OperationalError, match="versions"):
        registry.migrate()
    assert rows(tmp_path, "SELECT name FROM sqlite_master ORDER BY name") == before
    assert rows(tmp_path, "SELECT version_num FROM alembic_version") == [("0001",)]
    registry.close()


def test_a_newer_database_is_refused_and_left_alone(tmp_path: Path) -> None:
    registry = make(tmp_path)
    registry.migrate()
    with registry.write() as session:
        session.execute(sa.text("UPDATE alembic_version SET version_num = '9999'"))
    with pytest.raises(RegistryTooNew) as caught:
        registry.migrate()
    assert caught.value.revision == "9999"
    registry.close()


MIGRATE = """
import sys
from gossamer.store.registry.database import Registry
registry = Registry(sys.argv[1], busy_timeout_s=30)
print("ready", flush=True)
input()
registry.migrate()
registry.close()
"""


def test_processes_that_start_together_migrate_once(tmp_path: Path) -> None:
    race(MIGRATE, f"sqlite:///{tmp_path / 'registry.sqlite3'}")
    assert rows(tmp_path, "SELECT version_num FROM alembic_version") == [(revisions()[-1],)]


@pytest.mark.parametrize("dialect", ["postgresql", "sqlite"])
def test_the_migrations_compile_for_both_databases(dialect: str) -> None:
    config = configuration()
    config.output_buffer = io.StringIO()
    config.attributes["dialect"] = dialect
    command.upgrade(config, "head", sql=True)
    sql = config.output_buffer.getvalue()
    for table in Model.metadata.tables:
        assert f"CREATE TABLE {table} " in sql
    assert ("TIMESTAMP WITH TIME ZONE" in sql) == (dialect == "postgresql")
    assert "PRAGMA" not in sql


def test_sqlite_is_set_up_for_durability(tmp_path: Path) -> None:
    registry = make(tmp_path)
    with registry.read() as session:
        asked = {
            pragma: session.execute(sa.text(f"PRAGMA {pragma}")).scalar_one()
            for pragma in ("journal_mode", "synchronous", "foreign_keys", "busy_timeout")
        }
    assert asked == {
        "journal_mode": "wal",
        "synchronous": 2,
        "foreign_keys": 1,
        "busy_timeout": 5000,
    }
    registry.close()


def test_foreign_keys_hold(tmp_path: Path) -> None:
    registry = make(tmp_path)
    registry.migrate()
    key = ApiKey(id="k", tenant_id=77, mac=b"", scope="user", label="", created_at=NOW)
    with pytest.raises(IntegrityError), registry.write() as session:
        session.add(key)
    registry.close()


def test_a_transaction_that_raises_leaves_nothing(tmp_path: Path) -> None:
    registry = make(tmp_path)
    registry.migrate()

    def fail_late() -> None:
        with registry.write() as session:
            session.add(Tenant(name="acme", created_at=NOW))
            session.flush()
            raise LookupError

    with pytest.raises(LookupError):
        fail_late()
    assert rows(tmp_path, "SELECT * FROM tenants") == []
    registry.close()


def test_times_come_back_aware_and_in_utc(tmp_path: Path) -> None:
    registry = make(tmp_path)
    registry.migrate()
    tokyo = datetime(2030, 1, 1, 9, 0, 0, 123456, tzinfo=timezone(timedelta(hours=9)))
    with registry.write() as session:
        session.add(Tenant(name="acme", created_at=tokyo))
    with registry.read() as session:
        found = session.execute(sa.select(Tenant.created_at)).scalar_one()
    assert found == tokyo
    assert found.tzinfo is UTC
    assert rows(tmp_path, "SELECT created_at FROM tenants") == [("2030-01-01 00:00:00.123456",)]
    with pytest.raises(sa.exc.StatementError, match="time zone"), registry.write() as session:
        session.add(Tenant(name="naive", created_at=datetime(2030, 1, 1)))
    registry.close()


def test_a_locked_database_is_an_error_in_bounded_time_and_still_reads(tmp_path: Path) -> None:
    with opened(tmp_path, busy_timeout_s=0.3) as store:
        version = push(store.catalog, "sql", 1)
        other = sqlite3.connect(tmp_path / "registry.sqlite3", isolation_level=None)
        other.execute("BEGIN IMMEDIATE")
        for write in (
            lambda: push(store.catalog, "sql", 2),
            lambda: store.catalog.delete("acme", "sql"),
            lambda: store.catalog.rollback("acme", "sql", 1),
            lambda: store.keys.create("acme"),
        ):
            start = time.monotonic()
            with pytest.raises(RegistryBusy) as caught:
                write()
            assert time.monotonic() - start < 3
            assert caught.value.waited_s == 0.3
        with store.catalog.resolve("acme", ["sql"]) as resolution:
            assert resolution.versions[0].digest == version.digest
            assert store.catalog.open(version.digest).deltas.keys() == BASE.table.keys()
        other.execute("ROLLBACK")
        other.close()
        assert push(store.catalog, "sql", 2).number == 2


def test_a_busy_thread_of_the_same_process_is_waited_for_and_no_longer(tmp_path: Path) -> None:
    registry = make(tmp_path, busy_timeout_s=0.2)
    registry.migrate()
    inside, leave = threading.Event(), threading.Event()

    def hold() -> None:
        with registry.write():
            inside.set()
            leave.wait(10)

    thread = threading.Thread(target=hold)
    thread.start()
    inside.wait(10)
    with pytest.raises(RegistryBusy), registry.write():
        pass
    leave.set()
    thread.join()
    with registry.write():
        pass
    registry.close()


def test_a_full_database_says_so_and_loses_nothing(tmp_path: Path) -> None:
    with opened(tmp_path) as store:
        push(store.catalog, "sql", 1)
        (pages,) = rows(tmp_path, "PRAGMA page_count")[0]

        @sa.event.listens_for(store.registry._engine, "checkout")
        def _cap(connection: sqlite3.Connection, *_: object) -> None:
            connection.execute(f"PRAGMA max_page_count={pages}")

        def fill() -> None:
            for seed in range(2, 60):
                push(store.catalog, f"adapter-{seed}", seed)

        with pytest.raises(StoreFull) as caught:
            fill()
        assert caught.value.where == "registry"
        assert store.catalog.show("acme", "sql").current == 1
        sa.event.remove(store.registry._engine, "checkout", _cap)


def test_upgrade_stops_at_the_revision_asked_for(tmp_path: Path) -> None:
    registry = make(tmp_path)
    with registry._writer.begin() as connection:
        upgrade(connection, "0001")
    assert rows(tmp_path, "SELECT version_num FROM alembic_version") == [("0001",)]
    assert {t for (t,) in rows(tmp_path, "SELECT name FROM sqlite_master WHERE type='table'")} == {
        "alembic_version",
        "tenants",
        "api_keys",
    }
    registry.close()
