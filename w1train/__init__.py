"""w1train: pretraining of diffusion language models on megatron-core."""

__version__ = "0.1.0"
