"""One file for each algorithm: the client's part and the server's part."""
