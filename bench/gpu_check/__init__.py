"""The check on a GPU: build, test, sanitise and measure within a fixed time, in one command.

Every stage is a child process with its own time limit. Results are written immediately, so that a
stage, or the whole check, can be killed at any time without losing earlier results.
"""
