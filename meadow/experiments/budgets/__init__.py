"""Privacy against utility: what each budget costs against no protection at all, and which of the clients pay for it."""
