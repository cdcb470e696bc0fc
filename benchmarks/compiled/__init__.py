"""What the compiler made of the GPU kernels, found out on a machine without a GPU."""
