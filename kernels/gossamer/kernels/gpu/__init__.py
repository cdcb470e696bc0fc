"""The kernels in Triton: on a CUDA or ROCm device, or in Triton's interpreter on the CPU."""
