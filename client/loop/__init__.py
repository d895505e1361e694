"""The training loop, which uses autograd, and its parts."""
