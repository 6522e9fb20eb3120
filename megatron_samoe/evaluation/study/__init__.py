"""Studies: the same training under several configurations and seeds, and what their differences are worth."""
