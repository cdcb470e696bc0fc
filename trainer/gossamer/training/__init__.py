"""Training methods that make sparse adapters."""
