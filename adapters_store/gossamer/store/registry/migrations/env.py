"""Alembic's entry: run the migrations on the connection that `migrate.upgrade` passes in.

Without one alembic prints the SQL instead, for the dialect named in the `dialect` attribute; that
is for reading, and for the test that both databases can be served.
"""

from __future__ import annotations

from alembic import context

from gossamer.store.registry import job_models  # noqa: F401 - its tables join the metadata
from gossamer.store.registry.models import Model

connection = context.config.attributes.get("connection")
if connection is not None:
    context.configure(connection=connection, target_metadata=Model.metadata)
else:
    context.configure(
        dialect_name=context.config.attributes["dialect"], target_metadata=Model.metadata
    )
with context.begin_transaction():
    context.run_migrations()
