"""Differential privacy: mechanisms, accounting, ledgers, declared releases, and the statistics of an audit."""
