"""Other systems on the same job, each in its own environment and its own process."""
