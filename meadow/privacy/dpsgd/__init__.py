"""Example-level DP-SGD: `step` has the private step and its guarantee, `mechanism` its constants, and `choose` picks the way
to clip per-example gradients: `book`, `hooks`, or one pass for each example."""
