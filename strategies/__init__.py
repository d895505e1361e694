"""How updates are shared and combined: which arrays travel, how they are packed, and one file for each algorithm."""

from meadow.strategies.check import check as check
from meadow.strategies.check import equal_weights as equal_weights
from meadow.strategies.registry import algorithm as algorithm
from meadow.strategies.registry import server_of as server_of
