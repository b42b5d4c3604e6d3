"""The check on a GPU: build, test, sanitise and measure within a fixed time, in one command.

Every stage is a child process with its own time limit. What it found is written at once, so that a
stage, or the whole check, may be killed at any time and what was found before is kept.
"""
