"""Batches: what of them is passed to the model, and which of their tokens count."""
