"""Candidates for how a sparse delta lies in a GPU's memory, compared without a GPU."""
