"""The commands that make what a run lacks, for messages."""

from __future__ import annotations

import os
import shlex
from pathlib import Path

from w1train.config.schema import Config

_DEFAULT_MASK_ID = 14
_MADE_BY = {"demo-data": "make demo", "curriculum-data": "make curriculum", "processes-data": "make processes"}
"""The commands that write all files of a directory of this name."""


def absolute(path: str) -> str:
    """Return a path from the root, as messages show it: a relative path depends on the directory in which the command was typed."""
    return os.path.abspath(path)


def make_tokenizer(config: Config) -> str:
    """Return the command that makes the tokenizer of the configuration."""
    path, mask = config.data.tokenizer, config.diffusion.mask_token_id
    if (made_by := _MADE_BY.get(Path(path).parent.name)) is not None:
        return made_by
    if os.path.exists(path):
        output = str(Path(absolute(path)).with_name("tokenizer_with_mask.json"))
        return _command("import-tokenizer", input=absolute(path), output=output, eos="EOS_TOKEN")
    mask_option = {} if mask == _DEFAULT_MASK_ID else {"mask_token_id": str(mask)}
    return _command("train-tokenizer", input="CORPUS", output=absolute(path), vocab_size=str(config.model.vocab_size), **mask_option)


def make_dataset(config: Config, prefix: str, validation: str | None = None, *, overwrite: bool = False) -> str:
    """Return the command that makes a dataset, or what to write if the prefix is not a prefix.

    Args:
        validation: the prefix of a validation dataset that the same command shall split off; None = no such dataset.
        overwrite: replace the files that are there.
    """
    if (made_by := _MADE_BY.get(Path(prefix).parent.name)) is not None:
        return made_by
    stem, ending = os.path.splitext(prefix)
    if ending in (".bin", ".idx") and os.path.exists(f"{stem}.bin"):
        return f"{stem}, without the ending {ending}: the key takes the prefix of the files"
    # The key may name the text itself.
    text = absolute(prefix) if os.path.exists(prefix) else "CORPUS"
    output = absolute(prefix if text == "CORPUS" else f"{stem}-tokens")
    split = {} if validation is None else {"validation_output": absolute(validation), "validation_fraction": "0.001"}
    command = _command("tokenize", input=text, tokenizer=absolute(config.data.tokenizer), output=output, **split)
    return f"{command} --overwrite" if overwrite else command


def _command(verb: str, **options: str) -> str:
    words = [word for name, value in options.items() for word in (f"--{name.replace('_', '-')}", value)]
    return shlex.join(["w1train", "data", verb, *words])
