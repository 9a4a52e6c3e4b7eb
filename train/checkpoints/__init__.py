"""What a run folder keeps, and how it is known to be whole."""
