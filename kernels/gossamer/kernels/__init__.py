"""Gather/scatter kernels for sparse deltas: plain tensors in, plain tensors out."""
