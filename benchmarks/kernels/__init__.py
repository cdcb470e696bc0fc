"""The CPU's kernels on shapes of a small model: `python -m benchmarks.kernels`."""
