"""How fast gossamer serves many adapters, against its own base-only rate and other systems.

`python -m benchmarks.serving --help`; docs/benchmarks.md tells what is measured and why.
"""
