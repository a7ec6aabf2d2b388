"""The diffusion Transformer, from megatron-core's layers."""
