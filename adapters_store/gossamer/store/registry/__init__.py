"""What the store knows about its blobs: tenants, keys, adapters, versions, files, in SQL. And the
training jobs.

`models` and `job_models` are the schema, `migrations` its history, `database.Registry` the way in.
Only the catalog, the files, the keys and the jobs' backlog use it.
"""
