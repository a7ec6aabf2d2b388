"""The seam with megatron-core: it builds models and optimizers, and orders what happens to gradients."""
