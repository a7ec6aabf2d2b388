"""Whether a checkpoint can hold the model that its configuration describes: asked before memory is taken for the model."""

from __future__ import annotations

from pathlib import Path

from w1train.config.errors import UserError
from w1train.config.schema import ModelConfig
from w1train.training.flops import num_parameters

_FEWEST_BYTES = 2
"""Of a stored parameter: bfloat16 is the smallest type that weights are saved in."""


def require_stored(checkpoint: Path, model: ModelConfig) -> None:
    """Compare the size of a checkpoint's files with the number of parameters that a configuration asks for.

    The configuration and the checkpoint's metadata are claims of whoever made them; a model of 10^13 parameters would be built before
    the first tensor turns out to be missing. The files' size is a fact.

    Raises:
        UserError: the files are too small.
    """
    expected, found = num_parameters(model), sum(path.stat().st_size for path in checkpoint.iterdir() if path.is_file())
    if found < _FEWEST_BYTES * expected:
        raise UserError(
            f"{checkpoint} has {found:,} bytes, which is too little for the {expected:,} parameters of the model that config.yaml describes"
        )
