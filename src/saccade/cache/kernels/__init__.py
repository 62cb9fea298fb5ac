"""Triton kernels of the cache room."""
