"""Algorithms of other libraries, made into ours."""
