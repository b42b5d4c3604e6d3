"""One pass over the batches of several processes."""
