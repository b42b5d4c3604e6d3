"""One pass shared by several processes, each with its own batches."""
