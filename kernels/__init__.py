"""GPU and CPU kernels: tensors in, tensors out. None yet."""
