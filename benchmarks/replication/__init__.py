"""What of the papers replicates on a small model: `python -m benchmarks.replication --help`."""
