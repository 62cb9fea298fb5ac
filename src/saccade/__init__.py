"""saccade: one engine, one vocabulary and one proof for efficient attention."""
