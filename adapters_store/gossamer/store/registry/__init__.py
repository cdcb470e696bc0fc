"""What the store knows about its blobs: tenants, keys, adapters and versions, in SQL.

`models` is the schema, `migrations` its history, `database.Registry` the way in. Only the catalog
and the keys use it.
"""
