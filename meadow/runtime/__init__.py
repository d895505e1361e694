"""What every process needs: errors, seeds, clock, logs and the identity of the running code."""
