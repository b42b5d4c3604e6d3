"""Forward passes with hooks that stream what the target layers read."""
