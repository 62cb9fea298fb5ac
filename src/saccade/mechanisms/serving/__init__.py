"""Systems that serve many requests: the same attention, and where its keys and values lie."""
