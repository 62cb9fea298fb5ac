"""Mixing tokens through a few pooled or learned ones."""
