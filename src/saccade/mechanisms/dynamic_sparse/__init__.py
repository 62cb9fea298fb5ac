"""Patterns that the data decide."""
