"""w1train: pretraining of diffusion language models on megatron-core."""

from w1train.runtime.version import __version__ as __version__
