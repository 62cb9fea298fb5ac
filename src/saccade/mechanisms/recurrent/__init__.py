"""Layers that carry a memory from token to token and learn while they read."""
