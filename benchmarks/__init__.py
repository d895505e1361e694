"""Benchmarks of this machine: `python -m benchmarks.NAME`. They are not part of an experiment."""
