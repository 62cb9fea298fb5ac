"""Patterns that are fixed before the data are seen."""
