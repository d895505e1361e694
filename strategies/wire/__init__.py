"""How messages for the clients of a node are packed, and how their replies are read."""
