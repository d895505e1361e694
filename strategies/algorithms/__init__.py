"""The algorithms: one file each, with client and server."""
