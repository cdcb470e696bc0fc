"""Workload traces: who asks for what and when. `python -m benchmarks.traces` writes them."""
