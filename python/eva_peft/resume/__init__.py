"""A pass that goes on after it was killed."""
