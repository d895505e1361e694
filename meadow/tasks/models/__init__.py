"""Models: trunks, heads, and modules for parameter-efficient fine-tuning."""
