"""What a person does: the `meadow` command, comparisons, sweeps, reports and pictures."""
