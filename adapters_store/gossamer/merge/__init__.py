"""Mixes: weighted merges of adapters, and what the engine must apply to serve one."""
