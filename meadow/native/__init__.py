"""Compiled code behind typed functions, and how it is built."""
