"""The Python interface: ``import w1train``, then ``w1train.train``, ``w1train.load`` and the other names of ``w1train.__all__``.

Everything runs in the caller's process, as one rank, with the functions that the commands use, so that the numbers are those of the
commands. Nothing is printed, warnings go to the loggers below ``w1train``, and errors are exceptions. After each call the process is as it
was before (w1train/guest.py). torch is imported when a call needs it.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from w1train.api_objects import Record, Run, TrainedModel
from w1train.config.errors import ConfigurationError, Problem, raise_if_any
from w1train.config.rules.rule import Rule
from w1train.config.schema import Config
from w1train.config.serialization import leaves
from w1train.preflight.start_rules import run_rules
from w1train.registered_names import NAME_RULES
from w1train.runtime.masking import remember_passwords
from w1train.runtime.run_directory import RunDirectory
from w1train.trained_model import load_trained, require_run

if TYPE_CHECKING:  # these modules import the tokenizers library
    from w1train.data.dataset import TokenDataset
    from w1train.data.tokenizer import Tokenizer

logger = logging.getLogger(__name__)


def load_config(recipe: str, overrides: Mapping[str, Any] | None = None, *, config_dirs: Sequence[str | Path] = ()) -> Config:
    """Return the checked configuration of a recipe.

    Args:
        recipe: the name of a recipe, such as "demo".
        overrides: values by key, such as ``{"training.micro_batch_size": 4, "model": "w1_4b"}``; ``{"~KEY": None}`` goes back to a default.
        config_dirs: directories of own recipes (DIR/recipe/NAME.yaml).

    Raises:
        ConfigurationError: a UserError, and so a ValueError, whose text numbers all mistakes; ``problems`` has them one by one.
    """
    return _load_config(recipe, overrides, config_dirs)


def _load_config(
    recipe: str, overrides: Mapping[str, Any] | None, config_dirs: Sequence[str | Path], more_rules: Sequence[Rule] = ()
) -> Config:
    from w1train.config import compose

    texts, problems = _override_texts({"recipe": recipe, **(overrides or {})})
    try:
        config = compose.load_config(texts, [str(directory) for directory in config_dirs], [*NAME_RULES, *more_rules])
    except ConfigurationError as error:
        raise ConfigurationError(problems + error.problems) from None
    raise_if_any(problems)
    return config


def train(
    recipe: str,
    overrides: Mapping[str, Any] | None = None,
    *,
    config_dirs: Sequence[str | Path] = (),
    device: str | None = None,
    progress: bool = False,
    on_record: Callable[[Record], None] | None = None,
) -> Run:
    """Train a run in this process, as one rank, to its end. If the run has begun before, it resumes from its newest checkpoint.

    The run is the same, bit for bit, as that of ``w1train train recipe=RECIPE KEY=VALUE ...``. Ctrl-C (in a
    notebook: "interrupt") saves a checkpoint and then raises KeyboardInterrupt, and the same call resumes from there.

    Args:
        recipe: the name of a recipe, such as "demo".
        overrides: values by key, as for :func:`load_config`. ``runs_dir`` and ``name`` choose the directory of the run.
        config_dirs: directories of own recipes.
        device: "cpu", "cuda" or "cuda:N"; None = a GPU if there is one, and otherwise the CPU.
        progress: True: show a progress bar and what the run is, as the command does.
        on_record: a function that gets each record of training and validation as soon as it is made. Its exceptions end the run.

    Returns:
        The run.

    Raises:
        UserError: a mistake in the configuration, the data or the environment (a ValueError; the text lists all mistakes).
        CheckpointError: a checkpoint could not be written or read (a RuntimeError).
        FloatingPointError: the loss is NaN or infinite, and the run cannot continue.
        OSError: the disk is full or fails.
        KeyboardInterrupt: Ctrl-C.
    """
    config = _load_config(recipe, overrides, config_dirs, run_rules(1, 1))
    remember_passwords(str(value) for _, value in leaves(config))
    from w1train.guest import world_of_one

    directory = RunDirectory(Path(config.runs_dir) / config.name)
    with world_of_one(device) as ranks:
        from w1train.records.console import ConsoleSink
        from w1train.records.function_sink import function_sink
        from w1train.records.watch import SINKS
        from w1train.runtime.device import make_deterministic
        from w1train.runtime.monitor import monitored_as_guest
        from w1train.training.whole_run import train_run

        if config.training.deterministic:
            make_deterministic()
        sinks = [sink for sink in SINKS if progress or sink is not ConsoleSink]
        sinks += [] if on_record is None else [function_sink(on_record)]
        try:
            trainer = train_run(config, ranks, directory, sinks=sinks, monitor=monitored_as_guest)
        finally:
            directory.release()
    if trainer.stopped:
        raise KeyboardInterrupt(f"{directory.path} has saved step {trainer.progress.step}, from which the same call resumes")
    return Run(directory.path)


def open_run(path: str | Path) -> Run:
    """Return the run in a directory, whether it has ended or not.

    Raises:
        FileNotFoundError: the directory is not that of a run.
    """
    require_run(Path(path))
    return Run(Path(path))


def load(run: Run | str | Path, checkpoint: int | str | None = None, *, device: str | None = None) -> TrainedModel:
    """Load the model of a run's checkpoint, whatever layout it was trained in.

    Args:
        run: the run, or its directory.
        checkpoint: a step, "average" for the newest average, or the name of a directory in ``checkpoints/``; None = the newest step.
        device: "cpu", "cuda" or "cuda:N"; None = a GPU if there is one, and otherwise the CPU.

    Raises:
        FileNotFoundError: the directory is not that of a run.
        UserError: the checkpoint does not exist (the message lists those that do) or is damaged, or the run's files cannot be used.
    """
    run = open_run(run.path if isinstance(run, Run) else run)
    from w1train.guest import world_of_one

    with world_of_one(device) as ranks:
        return TrainedModel(run, load_trained(run.path, checkpoint, ranks), device)


def open_dataset(prefix: str | Path) -> TokenDataset:
    """Open a dataset of tokens, PREFIX.bin and PREFIX.idx, in shards or not, after a check of its files.

    ``num_documents`` and ``num_tokens`` count, ``document_tokens(i)`` returns the tokens of a document (an array, with <eos> as the last
    token), and ``read(start, stop)`` returns any piece.

    Raises:
        DatasetError: a UserError; a file is missing, truncated or inconsistent.
    """
    from w1train.data import sharded_dataset

    return sharded_dataset.open_dataset(prefix)


def write_dataset(prefix: str | Path, texts: Iterable[str], tokenizer: Tokenizer, *, overwrite: bool = False) -> TokenDataset:
    """Tokenize texts, each of which becomes a document, and write the dataset that a run trains on. ``data_tools.tokenize`` does this for
    files of any size.

    Args:
        prefix: the value for ``data.train`` or ``data.validation``: the files are PREFIX.bin, PREFIX.idx and PREFIX.json.
        texts: the documents. A text of length 0 is skipped.
        overwrite: True: replace a dataset that exists.

    Raises:
        DatasetError: a UserError; the dataset exists, or there is no text.
        TokenizerError: a UserError; a text is not Unicode.
    """
    from w1train.data.writer import DatasetWriter

    num_skipped = 0
    with DatasetWriter(prefix, tokenizer, overwrite) as writer:
        for text in texts:
            if text:
                writer.add_document(tokenizer.encode(text), len(text.encode()))
            else:
                num_skipped += 1
        writer.finalize()
    if num_skipped:
        logger.info("%s: skipped %d texts without a character", prefix, num_skipped)
    return open_dataset(prefix)


def _override_texts(overrides: Mapping[str, Any]) -> tuple[list[str], list[Problem]]:
    # The import of Hydra takes a third of a second.
    from w1train.config.override_texts import override_texts

    return override_texts(overrides)
