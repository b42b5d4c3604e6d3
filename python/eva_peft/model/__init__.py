"""What is adapted, and what the model says of itself."""
