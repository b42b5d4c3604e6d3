"""Every number in the README comes from here: ``python -m bench``."""
