"""What a process is: errors, seeds, clock, logs and the identity of the code that runs."""
