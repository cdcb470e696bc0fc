"""The base's products, which are the library's."""

from gossamer.kernels.reference.linear import linear

__all__ = ["linear"]
