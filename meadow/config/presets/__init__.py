"""Presets: named sets of settings. The first line of each file is its description."""
