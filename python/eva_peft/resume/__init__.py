"""Checkpoints, from which a killed pass resumes."""
