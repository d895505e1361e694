"""Measurements of the machine that they run on: `python -m benchmarks.NAME`. No part of an experiment."""
