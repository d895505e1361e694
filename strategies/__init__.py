"""Algorithms, one file each; which arrays are shared, how they are packed, and how updates are transformed."""

from meadow.strategies.check import check as check
from meadow.strategies.check import equal_weights as equal_weights
from meadow.strategies.registry import algorithm as algorithm
from meadow.strategies.registry import server_of as server_of
