"""The format of messages to the clients of a node, and of their replies."""
