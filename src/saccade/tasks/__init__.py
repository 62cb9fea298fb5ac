"""Generated tasks with exact scores."""
