"""The schema's history, for alembic; run by `gossamer.store.registry.migrate`."""
