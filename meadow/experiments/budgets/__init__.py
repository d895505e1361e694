"""Privacy against utility: what each budget costs compared with no protection, and which clients pay for it."""
