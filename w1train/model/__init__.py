"""The diffusion Transformer, built from megatron-core's layers."""
