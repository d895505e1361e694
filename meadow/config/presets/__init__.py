"""Presets: named values on the axes. Each file's first line says what it is."""
