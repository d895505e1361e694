"""The coordinator: rounds, admission, evaluation, checkpoints, the run folder, and the Flower ServerApp."""
