"""saccade: one engine, one vocabulary and one proof for efficient attention."""
__version__ = "0.1.0"
