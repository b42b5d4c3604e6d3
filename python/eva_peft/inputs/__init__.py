"""Batches, what of them the model gets, and which of their tokens count."""
