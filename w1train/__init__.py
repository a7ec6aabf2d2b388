"""w1train: pretraining of diffusion language models on megatron-core.

The names of ``__all__`` are the Python interface (docs/python_api.md). The import of this package takes no time: what a name needs is
imported when the name is used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from w1train.runtime.version import __version__ as __version__

if TYPE_CHECKING:
    from w1train.api import load as load
    from w1train.api import load_config as load_config
    from w1train.api import open_dataset as open_dataset
    from w1train.api import open_run as open_run
    from w1train.api import train as train
    from w1train.api import write_dataset as write_dataset
    from w1train.api_objects import Canvas as Canvas
    from w1train.api_objects import Run as Run
    from w1train.api_objects import Score as Score
    from w1train.api_objects import TrainedModel as TrainedModel
    from w1train.config.errors import UserError as UserError
    from w1train.data.tokenizer import Tokenizer as Tokenizer
    from w1train.data.tokenizer import train_tokenizer as train_tokenizer

_MODULES = {
    **dict.fromkeys(("load", "load_config", "open_dataset", "open_run", "train", "write_dataset"), "w1train.api"),
    **dict.fromkeys(("Canvas", "Run", "Score", "TrainedModel"), "w1train.api_objects"),
    "UserError": "w1train.config.errors",
    **dict.fromkeys(("Tokenizer", "train_tokenizer"), "w1train.data.tokenizer"),
}
"""The module of each name."""

__all__ = ["__version__", *_MODULES]


def __getattr__(name: str) -> object:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(_MODULES[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
