"""Timings of every op compared with its plain twin, PEFT's step and the machine's ceilings."""
