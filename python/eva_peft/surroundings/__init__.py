"""The environment of a pass, left unchanged: devices, memory, random states, signals, files."""
