"""Splits: which client gets which samples, and how these are parted into train, validation and test."""
