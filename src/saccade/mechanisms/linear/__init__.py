"""Attention in time linear in the number of tokens."""
