"""The experiment file: its schema, how it is read, the presets, and the seeds that every draw comes from."""
