"""Meadow: federated-learning experiments, the same data under every way to train."""

from pathlib import Path

# In a checkout and in Flower's app bundle four rooms (strategies, client, server, simulation) stand beside this folder.
__path__.append(str(Path(__file__).resolve().parent.parent))
