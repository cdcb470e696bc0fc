"""Adapters at rest: the packed file, its validation, blobs, the registry, the catalog."""
