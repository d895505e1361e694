"""Programs of the containers in addition to Flower's own: keys, the entry of each service, the submission of the run."""
