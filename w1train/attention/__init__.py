"""Attention: which tokens see which, and the kernels that compute it."""
