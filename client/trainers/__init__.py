"""Trainers: what runs a client's local training, and how one of them is chosen."""
