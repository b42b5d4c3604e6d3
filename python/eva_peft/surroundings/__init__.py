"""What a pass runs in, and leaves as it was: devices, memory, random states, signals, files."""
