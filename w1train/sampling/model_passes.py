"""The predictions of a model for the positions of a canvas, from passes over the whole canvas or over one block.

A kernel reads the model's distribution of each token given all *other* tokens (leave-one-out). Full posteriors
(diffusion.prediction=full) and scores (diffusion.loss=score_entropy) are converted here, so no kernel and no reviser has several cases.

Shapes: b = rows of a batch, l = tokens of a row, w = tokens of the current block, v = vocabulary.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from w1train.config.schema import DiffusionConfig
from w1train.config.schema_sampling import SamplingConfig
from w1train.diffusion.prediction import evidence, leave_one_out_from_full, leave_one_out_from_scores
from w1train.diffusion.processes import noise_process

Predict = Callable[[Tensor, Tensor], Tensor]
"""A model of one stream: (tokens int64 [b, l], t float32 [b]) -> logits [b, l, v]. Rows have equal lengths and no padding."""


TimestepAt = Callable[[Tensor], Tensor]
"""NoiseProcess.timestep_at: the t of noising probabilities, float32 [b]."""


@runtime_checkable
class BlockPredict(Protocol):
    """A block-diffusion model (w1train.inference.predictor.BlockPredictor)."""

    @property
    def block_size(self) -> int:
        """The number of tokens that a block had in training."""

    def start(self, length: int, block_size: int) -> None:
        """Start a new batch, of rows of ``length`` tokens."""

    def append(self, tokens: Tensor) -> None:
        """Keep the next finished blocks, int64 [b, n]."""

    def predict_block(self, tokens: Tensor, timesteps: Tensor) -> Tensor:
        """Return logits [b, w, v] of the block after the finished blocks, from its tokens, int64 [b, w], and t, float32 [b]."""

    def select_rows(self, rows: Tensor) -> None:
        """Keep some of the rows, int64 [new b]; the others have ended."""


@runtime_checkable
class HasNoiseRates(Protocol):
    """A model that knows its learned rates of noise."""

    def noise_rates(self) -> Tensor | None:
        """Return the rates, float32 [v]; None if the model learns none. Every rank of the model calls this."""


class Source(ABC):
    """The predictions of a model for the blocks of one batch."""

    by_block: bool
    """True: a block is final when it is finished, and a text ends with the block that has its first EOS. False: all text can change to the
    end, and a completion is generated to its end, as in LLaDA's generate."""

    def __init__(self, diffusion: DiffusionConfig) -> None:
        self._process, self._mask_token_id = noise_process(diffusion), diffusion.mask_token_id
        # Where all noise is on the mask token, all three are the same.
        has_other_tokens = self._process.bound == "kl_is"
        self._is_full = diffusion.prediction == "full" and has_other_tokens
        self._is_scores = diffusion.loss == "score_entropy" and has_other_tokens

    def enter(self, canvas: Tensor, start: int) -> int:
        """Prepare for the block at ``start``; return how many passes this took."""
        return 0

    @abstractmethod
    def noised_share(self, noised: Tensor, start: int, end: int) -> Tensor:
        """Return the mean of ``noised``, float64 [b, l], over the tokens that share a t in training, float64 [b]."""

    @abstractmethod
    def _logits(self, canvas: Tensor, timesteps: Tensor, start: int, end: int) -> Tensor:
        """Return the logits of the block, [b, w, v]."""

    def timesteps(self, noised: Tensor, start: int, end: int) -> Tensor:
        """Return the t that the model gets, float32 [b].

        Args:
            noised: float64 [b, l], the probability that noise has replaced each token of the canvas.
            start, end: the block.
        """
        return self._process.timestep_at(self.noised_share(noised, start, end)).float()

    def logits(self, canvas: Tensor, timesteps: Tensor, start: int, end: int) -> Tensor:
        """Return logits of the distribution of each token of the block given all other tokens, [b, w, v].

        Args:
            canvas: int64 [b, l].
            timesteps: float32 [b], the t that the model gets.
        """
        logits, tokens = self._logits(canvas, timesteps, start, end), canvas[:, start:end]
        if not (self._is_full or self._is_scores):
            return logits
        rows, ids = logits.flatten(0, 1).double(), tokens.flatten()
        times = timesteps[:, None].expand(tokens.shape).flatten()
        leave_one_out = self._from_scores(rows, ids, times) if self._is_scores else self._from_full(rows, ids, times)
        return leave_one_out.unflatten(0, tokens.shape)

    def _from_full(self, logits: Tensor, ids: Tensor, timesteps: Tensor) -> Tensor:
        return leave_one_out_from_full(logits, ids, evidence(self._process, timesteps, ids))

    def _from_scores(self, logits: Tensor, ids: Tensor, timesteps: Tensor) -> Tensor:
        times, is_mask = timesteps.double(), torch.arange(logits.shape[1], device=ids.device) == self._mask_token_id
        noise = self._process.word_noise(times)
        return leave_one_out_from_scores(logits.masked_fill(is_mask, -torch.inf), ids, self._process.alpha(times), noise)

    def select_rows(self, rows: Tensor) -> None:
        """Keep some of the rows, int64 [new b]; the others have ended."""
        raise AssertionError("rows of a whole canvas end together")


class WholeCanvas(Source):
    """Predictions from a pass over the whole canvas at each step."""

    by_block = False

    def __init__(self, predict: Predict, diffusion: DiffusionConfig) -> None:
        super().__init__(diffusion)
        self._predict = predict

    def noised_share(self, noised: Tensor, _start: int, _end: int) -> Tensor:
        return noised.sum(dim=1) / noised.shape[1]

    def _logits(self, canvas: Tensor, timesteps: Tensor, start: int, end: int) -> Tensor:
        logits = self._predict(canvas.clone(), timesteps)
        assert logits.shape[:2] == canvas.shape, f"predict gave {tuple(logits.shape)} for tokens {tuple(canvas.shape)}"
        return logits[:, start:end]


class Blocks(Source):
    """Predictions of a block-diffusion model, from a pass over the block at each step, and one pass over each finished block."""

    by_block = True

    def __init__(self, model: BlockPredict, length: int, config: SamplingConfig, diffusion: DiffusionConfig) -> None:
        super().__init__(diffusion)
        self._model, self._num_finished = model, 0
        model.start(length, config.block_size or model.block_size)

    def enter(self, canvas: Tensor, start: int) -> int:
        """Let the model keep the keys and values of the tokens before ``start`` that it does not have yet: first the whole blocks of the
        prompt, later the block that was just finished."""
        if start == self._num_finished:
            return 0
        self._model.append(canvas[:, self._num_finished : start].clone())
        self._num_finished = start
        return 1

    def noised_share(self, noised: Tensor, start: int, end: int) -> Tensor:
        return noised[:, start:end].sum(dim=1) / (end - start)

    def _logits(self, canvas: Tensor, timesteps: Tensor, start: int, end: int) -> Tensor:
        return self._model.predict_block(canvas[:, start:end].clone(), timesteps)

    def select_rows(self, rows: Tensor) -> None:
        self._model.select_rows(rows)


def source_of(model: Predict | BlockPredict, length: int, config: SamplingConfig, diffusion: DiffusionConfig) -> Source:
    """Return the predictions of a model for a batch of rows of ``length`` tokens."""
    return Blocks(model, length, config, diffusion) if isinstance(model, BlockPredict) else WholeCanvas(model, diffusion)
