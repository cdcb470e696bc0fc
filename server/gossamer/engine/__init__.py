"""Continuous batching over one base model, with another mix of adapters in every row."""
