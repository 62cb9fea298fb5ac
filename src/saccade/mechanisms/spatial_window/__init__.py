"""Windows and neighbourhoods on grids."""
