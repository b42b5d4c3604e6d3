"""The cost of a step against width, tokens, layer inputs and components, each varied alone."""
