"""What faults cost: `python -m benchmarks.faults`."""
