"""Named arrays: sums, files, shared memory between processes, and Flower's records."""
