"""The same backlog on PostgreSQL: what can be said without a server, then everything on one.

Each test has a database of its own. Without a server, and without the programs to start one, they
are left out (see `tests.postgres`).
"""

from __future__ import annotations

import importlib
import inspect
import secrets
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import sqlalchemy as sa
from sqlalchemy.dialects import postgresql

from gossamer.jobs.claiming import next_query
from gossamer.jobs.views import JobLimits
from tests import postgres
from tests.jobs import test_log, test_zombies
from tests.jobs.support import Bench, benched
from tests.store.support import Clock

MODULES = [
    importlib.import_module(f"tests.jobs.test_{name}")
    for name in ("backlog", "claiming", "log", "outcomes", "processes", "steering")
]
#: every test that needs a bench and nothing else
SCENARIOS = [
    test
    for module in MODULES
    for name, test in inspect.getmembers(module, inspect.isfunction)
    if name.startswith("test_") and list(inspect.signature(test).parameters) == ["bench"]
]
needs_server = pytest.mark.skipif(not postgres.available(), reason="PostgreSQL is not installed")


@pytest.fixture(scope="module")
def server() -> Iterator[sa.URL]:
    with postgres.serving() as url:
        yield sa.make_url(url)


@pytest.fixture
def url(server: sa.URL) -> Iterator[str]:
    """A new, empty database."""
    name = f"gossamer_test_{secrets.token_hex(6)}"
    admin = sa.create_engine(server, isolation_level="AUTOCOMMIT")
    with admin.connect() as connection:
        connection.execute(sa.text(f"CREATE DATABASE {name}"))
    yield server.set(database=name).render_as_string(hide_password=False)
    with admin.connect() as connection:
        connection.execute(sa.text(f"DROP DATABASE {name} WITH (FORCE)"))
    admin.dispose()


@pytest.fixture
def bench(tmp_path: Path, url: str, request: pytest.FixtureRequest) -> Iterator[Bench]:
    scenario = request.node.callspec.params["scenario"]
    events = test_log.KEEP if scenario.__module__ == test_log.__name__ else 10_000
    limits = JobLimits(unfinished=100, events=events)
    with benched(tmp_path, limits, database_url=url, busy_timeout_s=60) as bench:
        yield bench


def test_a_worker_skips_the_jobs_that_others_are_taking() -> None:
    statement = str(next_query(Clock().now, None).compile(dialect=postgresql.dialect()))
    assert statement.rstrip().endswith("FOR UPDATE SKIP LOCKED")


def test_there_is_something_to_run_on_a_server() -> None:
    assert len(SCENARIOS) > 40


@needs_server
@pytest.mark.parametrize("scenario", SCENARIOS, ids=lambda test: test.__name__)
def test_on_postgresql(bench: Bench, scenario: Callable[[Bench], None]) -> None:
    scenario(bench)


@needs_server
@pytest.mark.parametrize(
    "scenario", [test_zombies.taken_over, test_zombies.finished_by_another, test_zombies.cancelled]
)
def test_zombies_on_postgresql(bench: Bench, tmp_path: Path, scenario: Callable[..., None]) -> None:
    test_zombies.test_every_write_of_a_zombie_is_refused_and_changes_nothing(
        bench, tmp_path, scenario
    )
