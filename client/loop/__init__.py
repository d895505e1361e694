"""The training loop by autograd, and its parts."""
