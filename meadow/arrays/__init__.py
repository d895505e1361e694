"""Named arrays: how they are added up, kept in files, moved between processes and put into Flower's records."""
