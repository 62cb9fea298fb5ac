"""Mixing tokens by convolution."""
