"""Element-wise parts of the step and the loss as Triton kernels, each with a twin in plain PyTorch."""
