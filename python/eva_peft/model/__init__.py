"""Which layers of a model are adapted, and how the model reads its batches."""
