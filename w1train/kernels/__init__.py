"""Triton kernels of the element-wise parts of a step and of the loss, each with a twin in plain PyTorch."""
