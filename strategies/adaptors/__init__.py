"""Adapts algorithms of other libraries."""
