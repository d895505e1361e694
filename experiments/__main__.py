"""`python -m experiments` is the same as `meadow`."""

from experiments.command import main

main()
