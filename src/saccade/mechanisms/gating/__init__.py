"""Multiplying tokens by gates that the context computes."""
