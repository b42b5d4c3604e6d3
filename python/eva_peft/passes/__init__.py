"""Forward passes with hooks that stream the inputs of the target layers."""
