"""Pictures, and the style that they share."""
