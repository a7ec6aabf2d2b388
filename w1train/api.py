"""The Python interface: ``import w1train``, then ``w1train.train``, ``w1train.load`` and the other names of ``w1train.__all__``.

Everything runs in the caller's process, as one rank, with the functions that the commands use, so that the numbers are those of the
commands. Nothing is printed, warnings go to the loggers below ``w1train``, and errors are exceptions. After each call the process is as it
was before (w1train/runtime/guest.py). torch is imported when a call needs it.

Shapes: b = rows of a batch, l = tokens of a row, v = vocabulary, n = records.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, overload

import numpy as np
from numpy.typing import NDArray

from w1train.config.errors import ConfigurationError, Problem, UserError, raise_if_any
from w1train.config.reading import read_json_object
from w1train.config.rules.validate import validate
from w1train.config.schema import Config
from w1train.config.serialization import config_from_yaml, leaves
from w1train.registered_names import NAME_RULES
from w1train.runtime.masking import remember_passwords
from w1train.runtime.record_files import read_metrics
from w1train.runtime.run_directory import RunDirectory
from w1train.runtime.status import read_status
from w1train.trained_model import load_trained, require_run

if TYPE_CHECKING:  # these modules import torch or the tokenizers library
    import torch

    from w1train.data.dataset import TokenDataset
    from w1train.data.tokenizer import Tokenizer
    from w1train.inference.predictor import InferenceModel
    from w1train.sampling.denoise import DenoisingStep
    from w1train.sampling.text import TextSample

logger = logging.getLogger(__name__)

Record = dict[str, Any]
"""A record of a run: names and values, as a line of metrics.jsonl has them."""


def load_config(recipe: str, overrides: Mapping[str, Any] | None = None, *, config_dirs: Sequence[str | Path] = ()) -> Config:
    """Return the checked configuration of a recipe.

    Args:
        recipe: the name of a recipe, such as "demo".
        overrides: values by key, such as ``{"training.micro_batch_size": 4, "model": "w1_4b"}``; ``{"~KEY": None}`` goes back to a default.
        config_dirs: directories of own recipes (DIR/recipe/NAME.yaml).

    Raises:
        ConfigurationError: a UserError, and so a ValueError, whose text numbers all mistakes; ``problems`` has them one by one.
    """
    from w1train.config import compose

    texts, problems = _override_texts({"recipe": recipe, **(overrides or {})})
    try:
        config = compose.load_config(texts, [str(directory) for directory in config_dirs], NAME_RULES)
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

    The run is the same, bit for bit, as that of ``python -m w1train.pretrain recipe=RECIPE KEY=VALUE ...`` with one rank. Ctrl-C (in a
    notebook: "interrupt") saves a checkpoint and then raises KeyboardInterrupt, and the same call resumes from there.

    Args:
        recipe, overrides, config_dirs: as in :func:`load_config`. ``runs_dir`` and ``name`` choose the directory of the run.
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
    config = load_config(recipe, overrides, config_dirs=config_dirs)
    raise_if_any(validate(config, world_size=1))
    remember_passwords(str(value) for _, value in leaves(config))
    from w1train.runtime.guest import world_of_one

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
        FileNotFoundError: the run or the checkpoint does not exist; the message lists the checkpoints that do.
        UserError: the run's files cannot be used, or the checkpoint is damaged.
    """
    run = open_run(run.path if isinstance(run, Run) else run)
    from w1train.runtime.guest import world_of_one

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


@dataclass(frozen=True, slots=True)
class Run:
    """A run directory. Its files are read when a property is, so a run that is training can be watched."""

    path: Path

    @property
    def config(self) -> Config:
        """The configuration, with every default."""
        return config_from_yaml(self.path / "config.yaml")

    @property
    def state(self) -> str:
        """The state of the run: "running", "finished", "stopped", "failed", ..., or "unknown" without a status.json."""
        status = read_status(self.path)
        return "unknown" if status is None else status.state

    @property
    def metrics(self) -> list[Record]:
        """The records of metrics.jsonl in order, with "kind" ("train", "validation" or "average"), "step", "tokens" and the measurements:
        "loss" and "elbo" in nats per token, "elbo_bits_per_byte", ..."""
        return read_metrics(RunDirectory(self.path).metrics)

    @property
    def samples(self) -> list[Record]:
        """The texts that were sampled during training, with "step", "prompt" and "text"."""
        path = RunDirectory(self.path).samples
        return read_metrics(path) if path.is_file() else []

    @property
    def summary(self) -> Record:
        """The run in numbers (summary.json, which a run writes at its end)."""
        return read_json_object(RunDirectory(self.path).summary, "summary")

    @property
    def checkpoints(self) -> list[str]:
        """The names of the complete checkpoints, each of which :func:`load` takes: the steps in ascending order, then the averages."""
        from w1train.checkpoints.checkpoint_names import average_paths, step_path
        from w1train.checkpoints.manifest import complete_steps, is_complete

        directory = RunDirectory(self.path).checkpoints
        steps = [step_path(directory, step).name for step in complete_steps(directory)]
        return steps + [path.name for path in average_paths(directory) if is_complete(path)]

    def curve(self, name: str, kind: str = "train") -> tuple[NDArray[np.int64], NDArray[np.float64]]:
        """Return the steps, int64 [n], and the values, float64 [n], of a measurement of the run, for a plot.

        Args:
            name: the name of a number in the records, such as "loss" or "elbo_bits_per_byte".
            kind: the kind of the records: "train", "validation" or "average".

        Raises:
            UserError: no record of this kind has such a number; the message lists the names.
        """
        records = [record for record in self.metrics if record["kind"] == kind]
        points = [(record["step"], record[name]) for record in records if _is_number(record.get(name))]
        if not points:
            names = sorted({key for record in records for key, value in record.items() if _is_number(value)})
            raise UserError(
                f"no record of kind {kind!r} in {self.path} has the number {name!r}; there are: {', '.join(names) or 'no records'}"
            )
        steps, values = zip(*points, strict=True)
        return np.array(steps, dtype=np.int64), np.array(values, dtype=np.float64)


@dataclass(frozen=True, slots=True)
class Score:
    """The likelihood of a text under a model, which is a bound.

    ``log_likelihood`` estimates a lower bound of log p(text | prompt) in nats (arXiv 2502.09992, eq. 6): the model gives the text at least
    this probability. ``bits_per_byte`` is therefore an upper bound of what the text costs if the model compresses it, and lower is better.
    Bits per byte can be compared between tokenizers, and nats per token cannot. The masks are a function of the tokens: the same text has
    the same score in each call, and two models see the same masks.
    """

    text: str
    prompt: str
    log_likelihood: float
    """Nats, of the text without its prompt."""
    num_tokens: int
    """Tokens of the text."""
    num_bytes: int
    """Bytes of the text in UTF-8."""

    @property
    def nats_per_token(self) -> float:
        """The bound of the cross-entropy in nats per token."""
        return -self.log_likelihood / self.num_tokens

    @property
    def bits_per_byte(self) -> float:
        """The bound of the cross-entropy in bits per byte."""
        return -self.log_likelihood / (self.num_bytes * math.log(2))

    def __str__(self) -> str:
        return (
            f"at most {self.bits_per_byte:.4f} bits per byte, {self.nats_per_token:.4f} nats per token "
            f"({self.num_tokens} tokens, {self.num_bytes} bytes; the bound of a diffusion model, estimated from random masks)"
        )


@dataclass(frozen=True, slots=True)
class Canvas:
    """The texts of a batch after a step of denoising."""

    step: int
    """Number of the step, from 1."""
    num_steps: int | None
    """Steps in all; None = the model decides, as with a threshold."""
    t: float
    """The timestep that the model was given, from 1 (all is masked) to 0."""
    texts: list[str]
    """Prompt, decided tokens and suffix, with a shaded block for each token that is still masked."""

    def __str__(self) -> str:
        heading = f"step {self.step}{'' if self.num_steps is None else f'/{self.num_steps}'}  t = {self.t:.3f}"
        return "\n".join([heading, *self.texts])


class TrainedModel:
    """The model of a checkpoint, which generates and scores text. :func:`load` makes it."""

    def __init__(self, run: Run, inference: InferenceModel, device: str | None) -> None:
        self.run = run
        """The run that the model is from."""
        self._inference, self._device = inference, device

    def __repr__(self) -> str:
        return f"<w1train.TrainedModel {self.checkpoint.name} of {self.run.path}>"

    @property
    def model(self) -> torch.nn.Module:
        """The torch module, in evaluation mode: its parameters, buffers, layers and hooks. Call :meth:`logits` to run it."""
        return self._inference.predict.chunks[0]

    @property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer of the run."""
        return self._inference.tokenizer

    @property
    def config(self) -> Config:
        """The configuration of the run at the stage of the checkpoint, in a layout of one rank."""
        return self._inference.config

    @property
    def device(self) -> torch.device:
        """The device that the model is on."""
        return self._inference.device

    @property
    def step(self) -> int:
        """The number of steps that the checkpoint was trained for."""
        return self._inference.step

    @property
    def checkpoint(self) -> Path:
        """The directory of the checkpoint."""
        return self._inference.checkpoint

    @property
    def metrics(self) -> list[Record]:
        """The records of the run, as ``Run.metrics``."""
        return self.run.metrics

    @overload
    def generate(
        self,
        prompt: str = "",
        *,
        suffix: str | None = None,
        num_tokens: int | None = None,
        num_steps: int | None = None,
        threshold: float | None = None,
        block_size: int | None = None,
        temperature: float | None = None,
        remasking: str | None = None,
        seed: int | None = None,
        on_step: Callable[[Canvas], None] | None = None,
    ) -> TextSample: ...

    @overload
    def generate(
        self,
        prompt: Sequence[str],
        *,
        suffix: str | Sequence[str] | None = None,
        num_tokens: int | None = None,
        num_steps: int | None = None,
        threshold: float | None = None,
        block_size: int | None = None,
        temperature: float | None = None,
        remasking: str | None = None,
        seed: int | None = None,
        on_step: Callable[[Canvas], None] | None = None,
    ) -> list[TextSample]: ...

    def generate(
        self,
        prompt: str | Sequence[str] = "",
        *,
        suffix: str | Sequence[str] | None = None,
        num_tokens: int | None = None,
        num_steps: int | None = None,
        threshold: float | None = None,
        block_size: int | None = None,
        temperature: float | None = None,
        remasking: str | None = None,
        seed: int | None = None,
        on_step: Callable[[Canvas], None] | None = None,
    ) -> TextSample | list[TextSample]:
        """Generate text after each prompt, by iterative denoising. ``python -m w1train.sample`` gives the same texts. A setting that is
        None has the value of the run's ``sampling`` section.

        Args:
            prompt: a text that the model continues, or several.
            suffix: the text after the generated tokens, which are filled in between prompt and suffix; one for all prompts, or one for
                each. Only masked diffusion can do this.
            num_tokens, num_steps: tokens to generate, and denoising steps of all blocks together.
            threshold: unmask all tokens that are more probable than this at each step; 0 = use num_steps.
            block_size: tokens that are denoised together; 0 = as in training, or one block.
            temperature: 0 = the most probable tokens.
            remasking: "low_confidence" or "random": which predictions a step keeps.
            seed: the seed of the noise.
            on_step: a function that gets the canvas after each step, such as ``print``.

        Returns:
            A sample, whose ``text`` is the completion and whose ``str`` is the whole text, or a list of samples for a list of prompts.

        Raises:
            UserError: settings cannot work, a prompt is too long or has unknown tokens, or the checkpoint is of an autoregressive stage.
        """
        settings = {
            "num_tokens": num_tokens,
            "num_steps": num_steps,
            "threshold": threshold,
            "block_size": block_size,
            "temperature": temperature,
            "remasking": remasking,
            "seed": seed,
        }
        prompts = [prompt] if isinstance(prompt, str) else list(prompt)
        suffixes = [suffix] * len(prompts) if isinstance(suffix, str) else suffix
        samples = self._generate(prompts, suffixes, settings, on_step)
        return samples[0] if isinstance(prompt, str) else samples

    @overload
    def score(self, text: str, *, prompt: str = "", num_draws: int = ..., batch_size: int = ...) -> Score: ...

    @overload
    def score(
        self, text: Sequence[str], *, prompt: str | Sequence[str] = "", num_draws: int = ..., batch_size: int = ...
    ) -> list[Score]: ...

    def score(
        self, text: str | Sequence[str], *, prompt: str | Sequence[str] = "", num_draws: int = 128, batch_size: int = 32
    ) -> Score | list[Score]:
        """Estimate how likely each text is. ``python -m w1train.evaluate --likelihood`` gives the same numbers.

        Args:
            text: a text, or several.
            prompt: the text before it, which is not scored; one for all texts, or one for each.
            num_draws: random masks of each text. More masks give a more precise estimate, and take longer.
            batch_size: the largest number of rows in a pass. It changes the time and the memory, and not the noise.

        Returns:
            A score, or a list of scores for a list of texts. :class:`Score` says what the numbers mean.

        Raises:
            UserError: a text has no characters, is longer than model.max_sequence_length, or has the mask token; the checkpoint is of an
                autoregressive stage.
        """
        from w1train.evaluation.questions import Question, answer_questions
        from w1train.inference.predictor import require_diffusion

        require_diffusion(self._inference)
        texts = [text] if isinstance(text, str) else list(text)
        prompts = [prompt] * len(texts) if isinstance(prompt, str) else list(prompt)
        if len(prompts) != len(texts):
            raise UserError(f"there are {len(prompts)} prompts for {len(texts)} texts; give one for each text, or one for all")
        questions = [Question(place, *pair, 0, "text") for place, pair in enumerate(zip(prompts, ((each,) for each in texts), strict=True))]
        with self._world():
            answers = answer_questions(self._inference, questions, num_draws=num_draws, batch_size=batch_size)
        scores = [
            Score(answer.question.choices[0], answer.question.prompt, answer.log_likelihoods[0], answer.num_tokens[0], answer.num_bytes[0])
            for answer in answers
        ]
        return scores[0] if isinstance(text, str) else scores

    def validate(self, prefix: str | None = None) -> Record:
        """Repeat the validation of training with this checkpoint. ``python -m w1train.evaluate`` gives the same numbers.

        Args:
            prefix: the validation set; None = the run's.

        Returns:
            "elbo" (nats per token), "elbo_bits_per_byte", "masked_cross_entropy" (nats per masked token), "loss_by_t" (the same at each of
            "timesteps"), and more.

        Raises:
            UserError: there is no validation set, or it does not fit the model.
        """
        from w1train.evaluation.checkpoint_validation import validation_of

        with self._world():
            return validation_of(self._inference, prefix)

    def logits(self, tokens: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        """Return the logits of tokens, float32 [b, l, v], without gradients. Each row is one document, all of which is visible.

        Args:
            tokens: int64 [b, l]; masked tokens have ``config.diffusion.mask_token_id``.
            timesteps: float32 [b] in [0, 1]: the share of masked tokens in each row, under the linear schedule.
        """
        with self._world():
            return self._inference.predict(tokens.to(self.device), timesteps.to(self.device))

    def _generate(
        self,
        prompts: list[str],
        suffixes: Sequence[str] | None,
        settings: Mapping[str, Any],
        on_step: Callable[[Canvas], None] | None,
    ) -> list[TextSample]:
        from w1train.inference.predictor import require_diffusion
        from w1train.sampling.settings import with_given
        from w1train.sampling.text import sample_texts

        require_diffusion(self._inference)
        sampling = with_given(self.config.sampling, settings)
        with self._world():
            return sample_texts(
                self._inference.blocks or self._inference.predict,
                self.tokenizer,
                prompts,
                replace(self.config, sampling=sampling),
                device=self.device,
                suffixes=suffixes,
                on_step=None if on_step is None else lambda state: on_step(self._canvas(state, sampling.num_tokens)),
            )

    def _world(self) -> Any:
        from w1train.runtime.guest import world_of_one

        return world_of_one(self._device)

    def _canvas(self, state: DenoisingStep, num_tokens: int) -> Canvas:
        from w1train.sampling.display import draw_canvases

        texts = [row.plain for row in draw_canvases(state, self.tokenizer, num_tokens)]
        return Canvas(state.step, state.num_steps, state.t, texts)


def _override_texts(overrides: Mapping[str, Any]) -> tuple[list[str], list[Problem]]:
    # The import of Hydra takes a third of a second.
    from w1train.config.override_texts import override_texts

    return override_texts(overrides)


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
