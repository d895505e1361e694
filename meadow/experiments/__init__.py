"""The `meadow` command and its Python functions: runs, comparisons, sweeps, reports and figures."""
