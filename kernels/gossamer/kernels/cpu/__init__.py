"""The CPU backend: numba-compiled loops over explicit SIMD tiles, on torch's own OpenMP team."""
