"""Triton kernels and their launchers; ``eva_kernels.ops`` checks arguments and picks the backend.

Importing this package imports triton, which fixes whether kernels are compiled or interpreted.
"""
