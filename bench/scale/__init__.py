"""The cost of a step vs. width, tokens, layer inputs and components, one varied at a time."""
