"""The base model: its files, its fingerprint, its names and shapes, and the patch map."""
