"""Triton kernels, each with its launcher below it; ``eva_kernels.ops`` checks and chooses.

Importing this package imports triton, which fixes whether kernels are compiled or interpreted.
"""
