"""What each initialiser costs: seconds by phase, memory, data, and what it does to the model."""
