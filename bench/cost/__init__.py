"""The cost of each initialiser: seconds by phase, memory, data, and its effect on the model."""
