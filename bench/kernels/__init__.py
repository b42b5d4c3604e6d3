"""Timings of every operation against its plain twin, PEFT's step and the machine's ceilings."""
