"""What privacy costs. So far: accounting, that is epsilon of a history of sampled Gaussian mechanisms."""
