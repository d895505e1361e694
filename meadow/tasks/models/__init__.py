"""Models: backbones, heads, and the small modules that can be put into them."""
