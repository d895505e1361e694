"""What runs in the containers beside Flower's own programs: keys, the entry of each service, the submission of the run."""
