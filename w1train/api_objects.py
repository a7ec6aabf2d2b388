"""The objects of the Python interface: a run, a trained model, and what the model returns.

Shapes: b = rows of a batch, l = tokens of a row, v = vocabulary, n = records.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, overload

import numpy as np
from numpy.typing import NDArray

from w1train.config.errors import UserError
from w1train.config.reading import read_json_object
from w1train.config.schema import Config
from w1train.config.serialization import config_from_yaml
from w1train.runtime.record_files import read_metrics
from w1train.runtime.run_directory import RunDirectory
from w1train.runtime.status import read_status

if TYPE_CHECKING:  # these modules import torch or the tokenizers library
    import torch

    from w1train.data.tokenizer import Tokenizer
    from w1train.inference.predictor import InferenceModel
    from w1train.sampling.canvas import DenoisingStep
    from w1train.sampling.text import TextSample

Record = dict[str, Any]
"""A record of a run: names and values, as a line of metrics.jsonl has them."""


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
    """Prompt, tokens and suffix, with a shaded block for each token that is still masked, and with marks around tokens that the step has
    changed."""

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
        kernel: str | None = None,
        reviser: str | None = None,
        chat_template: str | None = None,
        on_step: Callable[[Canvas], None] | None = None,
    ) -> TextSample: ...

    @overload
    def generate(
        self,
        prompt: list[str] | tuple[str, ...],
        *,
        suffix: str | Sequence[str] | None = None,
        num_tokens: int | None = None,
        num_steps: int | None = None,
        threshold: float | None = None,
        block_size: int | None = None,
        temperature: float | None = None,
        remasking: str | None = None,
        seed: int | None = None,
        kernel: str | None = None,
        reviser: str | None = None,
        chat_template: str | None = None,
        on_step: Callable[[Canvas], None] | None = None,
    ) -> list[TextSample]: ...

    def generate(
        self,
        prompt: str | list[str] | tuple[str, ...] = "",
        *,
        suffix: str | Sequence[str] | None = None,
        num_tokens: int | None = None,
        num_steps: int | None = None,
        threshold: float | None = None,
        block_size: int | None = None,
        temperature: float | None = None,
        remasking: str | None = None,
        seed: int | None = None,
        kernel: str | None = None,
        reviser: str | None = None,
        chat_template: str | None = None,
        on_step: Callable[[Canvas], None] | None = None,
    ) -> TextSample | list[TextSample]:
        """Generate text after each prompt, by iterative denoising. ``w1train sample`` gives the same texts. A setting that is
        None has the value of the run's ``sampling`` section.

        Args:
            prompt: a text that the model continues, or several.
            suffix: the text after the generated tokens, which are filled in between prompt and suffix; one for all prompts, or one for
                each. Only masked diffusion can do this.
            num_tokens, num_steps: tokens to generate, and denoising steps of all blocks together.
            threshold: unmask all tokens that are more probable than this at each step; 0 = use num_steps.
            block_size: tokens that are denoised together; 0 = as in training, or one block.
            temperature: 0 = the most probable tokens.
            remasking: "low_confidence" or "random": which predictions a step of the kernel "unmask" keeps.
            seed: the seed of the noise.
            kernel: "unmask", "ancestral" or "gidd_posterior": the rule of a step.
            reviser: "conditional_modes" or "self_correction": revise the text after its last step.
            chat_template: the path of a chat template, or "built_in": each prompt is the message of a user, and the completion is the
                reply; "" = continue the prompts.
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
            "kernel": kernel,
            "reviser": reviser,
            "chat_template": chat_template,
        }
        prompts = [prompt] if isinstance(prompt, str) else list(prompt)
        suffixes = [suffix] * len(prompts) if isinstance(suffix, str) else suffix
        samples = self._generate(prompts, suffixes, settings, on_step)
        return samples[0] if isinstance(prompt, str) else samples

    @overload
    def revise(self, text: str, *, prompt: str = "", seed: int | None = None) -> TextSample: ...

    @overload
    def revise(
        self, text: list[str] | tuple[str, ...], *, prompt: str | Sequence[str] = "", seed: int | None = None
    ) -> list[TextSample]: ...

    def revise(
        self, text: str | list[str] | tuple[str, ...], *, prompt: str | Sequence[str] = "", seed: int | None = None
    ) -> TextSample | list[TextSample]:
        """Let the model change the tokens of a text that are probably wrong, by the reviser of the run's ``sampling`` section, or by
        conditional modes if that is null. ``w1train sample --revise`` gives the same texts.

        Args:
            text: a text, or several.
            prompt: the text before it, which does not change; one for all texts, or one for each.
            seed: the seed of the noise; None = that of the run's ``sampling`` section.

        Returns:
            A sample, whose ``text`` is the text after the revision, or a list of samples for a list of texts.

        Raises:
            UserError: a text is too long or has unknown tokens, or the checkpoint is of an autoregressive stage.
        """
        from w1train.data.conversations.chat_prompts import chat_prompts_of
        from w1train.inference.predictor import require_diffusion
        from w1train.sampling.settings import with_given
        from w1train.sampling.text import revise_texts

        require_diffusion(self._inference)
        texts = [text] if isinstance(text, str) else list(text)
        prompts = [prompt] * len(texts) if isinstance(prompt, str) else list(prompt)
        config = replace(self.config, sampling=with_given(self.config.sampling, {"seed": seed}))
        with self._world():
            predict = self._inference.blocks or self._inference.predict
            chat = chat_prompts_of(config, self.tokenizer)
            samples = revise_texts(predict, self.tokenizer, prompts, texts, config, device=self.device, chat=chat)
        return samples[0] if isinstance(text, str) else samples

    @overload
    def score(self, text: str, *, prompt: str = "", num_draws: int = ..., batch_size: int = ...) -> Score: ...

    @overload
    def score(
        self, text: list[str] | tuple[str, ...], *, prompt: str | Sequence[str] = "", num_draws: int = ..., batch_size: int = ...
    ) -> list[Score]: ...

    def score(
        self, text: str | list[str] | tuple[str, ...], *, prompt: str | Sequence[str] = "", num_draws: int = 128, batch_size: int = 32
    ) -> Score | list[Score]:
        """Estimate how likely each text is. ``w1train evaluate --likelihood`` gives the same numbers.

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
        from w1train.evaluation.questions import Question, answer_questions, warn_of_blocks
        from w1train.inference.predictor import require_diffusion

        require_diffusion(self._inference)
        warn_of_blocks(self.config)
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
        """Repeat the validation of training with this checkpoint. ``w1train evaluate`` gives the same numbers.

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
        from w1train.data.conversations.chat_prompts import chat_prompts_of
        from w1train.inference.predictor import require_diffusion
        from w1train.sampling.settings import with_given
        from w1train.sampling.text import sample_texts

        require_diffusion(self._inference)
        config = replace(self.config, sampling=with_given(self.config.sampling, settings))
        with self._world():
            return sample_texts(
                self._inference.blocks or self._inference.predict,
                self.tokenizer,
                prompts,
                config,
                device=self.device,
                chat=chat_prompts_of(config, self.tokenizer),
                suffixes=suffixes,
                on_step=None if on_step is None else lambda state: on_step(self._canvas(state)),
            )

    def _world(self) -> Any:
        from w1train.guest import world_of_one

        return world_of_one(self._device)

    def _canvas(self, state: DenoisingStep) -> Canvas:
        from w1train.sampling.display import draw_canvases

        texts = [row.plain for row in draw_canvases(state, self.tokenizer)]
        return Canvas(state.step, state.num_steps, state.t, texts)


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
