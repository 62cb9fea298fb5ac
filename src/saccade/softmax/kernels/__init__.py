"""Kernels in Triton; imported by the backends that launch them, when they do."""
