"""The interface of a noise process: how it corrupts tokens, and what it tells losses and samplers about the noise.

A process replaces each token x by z, independently of all other tokens, with probability

    q_t(z | x) = alpha_t [z = x] + c_t(z),    t from 0 (text) to 1 (noise).

alpha_t is the probability that the token is kept. c_t(z) is the probability that noise puts on z; over all z it adds up to 1 - alpha_t,
the noising probability. This is the family of D3PM (arXiv 2107.03006) and GIDD (arXiv 2503.04482). The timestep t and the noising
probability are two numbers, even if they are equal in a linear process.

Shapes: b = samples, l = sequence_length, g = segments per sample (stretches of tokens that share one t), k = words per token,
n = positions, v = vocabulary.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from w1train.config.errors import Problem
from w1train.config.schema import Config, DiffusionConfig
from w1train.data.batch import PackedBatch
from w1train.data.documents import block_ordinals, document_bounds
from w1train.diffusion.exact_counts import noise_exactly
from w1train.diffusion.philox import Purpose, random_words
from w1train.diffusion.schedules import solve_timestep
from w1train.diffusion.timesteps import antithetic, draw_fractions, timesteps_from_fractions, word_thresholds

type Bound = Literal["cross_entropy", "kl_is", "per_id"]

_LARGEST_WORD = (1 << 32) - 1


@dataclass(frozen=True, slots=True)
class NoiseDraw:
    """The random numbers of one corruption. They depend on nothing but these fields, so they are the same for every layout, device and
    micro-batch size."""

    seed: int
    keys: Tensor
    """int64 [b]: the key of each sample's random numbers. Both samples of a complementary pair have the same key."""
    draw: int = 0
    """Repetition for the same samples: 0 in training, 1 + i for the i-th timestep of validation."""
    timestep: float | None = None
    """The t of whole samples, for validation. None: each segment draws its own t."""

    def words(self, num: int) -> Tensor:
        """Return ``num`` random 32-bit words for each sample, int64 [b, num]."""
        return random_words(self.seed, self.keys, draw=self.draw, purpose=Purpose.NOISE, num=num)

    def segment_timesteps(self, batch: PackedBatch, config: DiffusionConfig) -> tuple[Tensor, Tensor]:
        """Return the segment of each token, int64 [b, l] in [0, g), and t of each segment, float64 [b, g]."""
        if self.timestep is not None:
            timesteps = torch.full((len(self.keys), 1), self.timestep, dtype=torch.float64, device=self.keys.device)
            return torch.zeros_like(batch.tokens), timesteps
        segments = _segments(batch, config)
        # A column for every possible segment would be l wide, so the largest segment that occurs decides. The columns beyond a sample's own
        # segments are rows of the table that no token points to. (Asking a GPU for the largest segment waits for the GPU.)
        num_segments = 1 if config.timestep_per == "sequence" else int(segments.max()) + 1
        share_timesteps = config.antithetic or config.coupled_draws
        keys = torch.div(self.keys, 2, rounding_mode="floor") if share_timesteps else self.keys
        fractions = draw_fractions(config, self.seed, keys, num_segments, self.draw)
        if config.antithetic:
            fractions = antithetic(fractions, self.keys)
        return segments, timesteps_from_fractions(config, fractions)


@dataclass(slots=True)
class Corruption:
    """Corrupted samples, and the tokens that are to be predicted. Each value belongs to the token at its position, whichever output
    predicts that token."""

    input_ids: Tensor
    """int64 [b, l]: the tokens after noise."""
    noised: Tensor
    """bool [b, l]: True for tokens that noise has replaced, some of them perhaps by themselves. In autoregression and in samples that are
    edited: predicted tokens."""
    predicted: Tensor
    """bool [b, l]: True for tokens that have a loss."""
    predictable: Tensor
    """bool [b, l]: True for tokens whose likelihood the objective bounds, whether they are predicted in this draw or not."""
    timesteps: Tensor
    """float32 [b, l]: t of each token, for the loss."""
    segments: Tensor
    """int64 [b, l]: segment of each token, counted inside its sample."""
    segment_timesteps: Tensor
    """float64 [b, g]: t of each segment, for the model."""
    shift: bool
    """True: the output at the position before a token predicts this token. False: the output at the token's own position predicts it."""


class NoiseProcess(ABC):
    """One noise process. A subclass defines alpha, c, their rates and the corruption; the rest follows from these."""

    name: ClassVar[str]
    """The process in words, for logs."""
    is_causal: ClassVar[bool] = False
    """True: the text stays clean, and each token is predicted from the tokens before it alone, so there is no t. False: there is noise."""
    words_per_token: ClassVar[int] = 1
    """Random words that the corruption of one token takes: the first decides whether noise replaces the token."""
    learns_rates: ClassVar[bool] = False
    """True: the model learns the rates of the noise with its weights, and ``with_rates`` gives them to the process."""
    predicts_every_token: ClassVar[bool] = False
    """True: noise may put an ordinary token in the place of a token, so every token that may be noised has a loss. False: the noised tokens
    have a loss."""
    bound: ClassVar[Bound] = "cross_entropy"
    """What a row contributes to the negative ELBO. cross_entropy: -log p(token), times ``elbo_weight``. kl_is: KL(q_t(. | x) ||
    q_t(. | prediction)) + rho - log rho - 1 with rho = q_t(z | x) / q_t(z | prediction), times ``bound_weight``. per_id: at a mask token,
    rate(x) (-log p(x) - 1) + sum over v of rate(v) p(v), where rate is the ``elbo_weight`` of each id."""
    schedules: ClassVar[tuple[str, ...]] = ("linear",)
    """The values of diffusion.noise_schedule with which the process works."""
    needs_noise_ids: ClassVar[bool] = False
    """True: diffusion.num_noise_ids says which ids noise can put in the place of a token."""
    masks_are_noise: ClassVar[bool] = False
    """True: the mask token is noise beside such ids, so the model may not predict it."""
    has_complements: ClassVar[bool] = True
    """False: the tokens that a sample at t leaves are not distributed as those that a sample at 1 - t noises, in any schedule."""
    edits_samples: ClassVar[bool] = False
    """True: all tokens of some samples have a loss, even if few tokens of the other samples have a loss."""
    mass_field: ClassVar[str] = "objective"
    """The field of diffusion to change if a step of noise has a negative probability."""
    mass_remedy: ClassVar[str | None] = None
    """A value of this field that works."""

    @property
    def fingerprint(self) -> str | None:
        """The SHA-256 of what the process has read from a file, which a resume compares; None if it reads no file."""
        return None

    def with_rates(self, rates: Tensor) -> NoiseProcess:
        """Return the process with the rates of noise that a model has learned, [vocabulary]."""
        raise AssertionError(f"{self.name} learns no rates")

    @abstractmethod
    def alpha(self, timesteps: Tensor) -> Tensor:
        """Return the probability that noise keeps a token at t, in the shape of ``timesteps``."""

    @abstractmethod
    def alpha_rate(self, timesteps: Tensor) -> Tensor:
        """Return the derivative of alpha with respect to t."""

    @abstractmethod
    def noise(self, timesteps: Tensor, ids: Tensor) -> Tensor:
        """Return c_t(z), the probability that noise puts on each of ``ids``, in the broadcast shape of both arguments."""

    @abstractmethod
    def noise_rate(self, timesteps: Tensor, ids: Tensor) -> Tensor:
        """Return the derivative of c_t(z) with respect to t."""

    @abstractmethod
    def noising_probability(self, timesteps: Tensor) -> Tensor:
        """Return 1 - alpha_t without the rounding of this difference."""

    def timestep_at(self, noising_probability: Tensor) -> Tensor:
        """Return the t with this noising probability: the inverse of ``noising_probability``."""
        return solve_timestep(self.noising_probability, noising_probability)

    @abstractmethod
    def replacements(self, tokens: Tensor, timesteps: Tensor, words: Tensor) -> Tensor:
        """Return the ids that noise puts in the places of the tokens that it replaces.

        Args:
            tokens: int64 [b, l], the clean tokens.
            timesteps: float64, broadcasts to [b, l].
            words: int64 [b, k, l], the random words of each token; ``words[:, 0]`` has decided whether the token is replaced.

        Returns:
            int64, broadcasts to [b, l].
        """

    @abstractmethod
    def is_noised(self, ids: Tensor) -> Tensor:
        """Return which positions a sampler has still to decide, bool in the shape of ``ids``."""

    def predicted_share(self, timesteps: Tensor) -> Tensor:
        """Return the expected share of the tokens that have a loss, in the shape of ``timesteps``, for plans."""
        return torch.ones_like(timesteps) if self.predicts_every_token else self.noising_probability(timesteps)

    def problems(self, _config: Config) -> Iterator[Problem]:
        """Yield what the process cannot work with in a configuration, beyond the rules of w1train.diffusion.process_checks."""
        yield from ()

    def elbo_weight(self, timesteps: Tensor) -> Tensor:
        """Return the weight of a noised token's cross-entropy in the negative ELBO, -alpha'_t / (1 - alpha_t) (MDLM, arXiv 2406.07524,
        eq. 10): 1/t in the linear process."""
        return -self.alpha_rate(timesteps) / self.noising_probability(timesteps)

    def word_noise(self, timesteps: Tensor) -> Tensor:
        """Return c_t(v) of an id v that is not the mask token and that noise can put in the place of a token, in the shape of
        ``timesteps``: 0 if all noise is on the mask token."""
        return torch.zeros_like(timesteps)

    def jump_rate(self, timesteps: Tensor, ids: Tensor) -> Tensor:
        """Return r_t(z) = c'_t(z) - (alpha'_t / alpha_t) c_t(z), the rate at which tokens become z, in the broadcast shape of both
        arguments."""
        decay = self.alpha_rate(timesteps) / self.alpha(timesteps)
        return self.noise_rate(timesteps, ids) - decay * self.noise(timesteps, ids)

    def bound_weight(self, timesteps: Tensor, inputs: Tensor, targets: Tensor) -> Tensor:
        """Return r_t(z) / q_t(z | x), the weight of a row in the negative ELBO per unit of t (GIDD, arXiv 2503.04482, eq. 9), float64.

        Args:
            timesteps: t of each row.
            inputs: int64, z: the token after noise.
            targets: int64, x: the clean token.
        """
        times = timesteps.double()
        probability = self.alpha(times) * (inputs == targets) + self.noise(times, inputs)
        return self.jump_rate(times, inputs) / probability

    def quadrature(self, fractions: Tensor) -> tuple[Tensor, Tensor]:
        """Return t and dt/du of fractions u in [0, 1], float64: the substitution in which the ELBO is the integral of a smooth function
        over u. u = 0 and u = 1 give the smallest and the largest t of the integral. The end terms of the bound hold what is beyond."""
        return fractions, torch.ones_like(fractions)

    def noised_tokens(self, tokens: Tensor, timesteps: Tensor, words: Tensor) -> Tensor:
        """Return which tokens noise replaces, bool [b, l]: those whose word is below the noising probability times 2^32.

        Args:
            tokens: int64 [b, l], the clean tokens.
            timesteps: float64, broadcasts to [b, l].
            words: int64 [b, l].
        """
        return words < word_thresholds(self.noising_probability(timesteps))

    def reverse_probabilities(self, ids: Tensor, predictions: Tensor, timesteps: Tensor, earlier: Tensor) -> Tensor:
        """Return the probabilities of the ids at an earlier timestep, given those at t and the model's prediction of the text.

            p(z_s | z_t) = (alpha_t|s [z_s = z_t] + c_t|s(z_t)) q_s(z_s | prediction) / q_t(z_t | prediction)

        with alpha_t|s = alpha_t / alpha_s and c_t|s = c_t - alpha_t|s c_s: Bayes' rule with the prediction instead of the one-hot clean
        token (GIDD, arXiv 2503.04482). The probabilities add up to 1.

        Args:
            ids: int64 [n], z_t.
            predictions: [n, v], probabilities of the clean token.
            timesteps: [n], t.
            earlier: [n], s below t.

        Returns:
            [n, v].
        """
        alpha, alpha_before = self.alpha(timesteps), self.alpha(earlier)
        kept = alpha / alpha_before
        jump = self.noise(timesteps, ids) - kept * self.noise(earlier, ids)
        now = alpha * predictions.gather(1, ids[:, None])[:, 0] + self.noise(timesteps, ids)
        every_id = torch.arange(predictions.shape[1], device=ids.device)
        before = alpha_before[:, None] * predictions + self.noise(earlier[:, None], every_id)
        stays = ids[:, None] == every_id
        return (kept[:, None] * stays + jump[:, None]) * before / now[:, None]

    def corrupt(self, batch: PackedBatch, config: DiffusionConfig, draw: NoiseDraw) -> Corruption:
        """Apply noise to each token that may be noised, with the noising probability at its segment's t. The noised tokens have
        a loss, or all tokens that may be noised (``predicts_every_token``)."""
        segments, segment_timesteps = draw.segment_timesteps(batch, config)
        timesteps = _at_tokens(segment_timesteps, segments)
        words = draw.words(self.words_per_token * batch.tokens.shape[1]).unflatten(1, (self.words_per_token, -1))
        predictable = batch.may_be_noised
        if config.shift:
            predictable = predictable & has_predecessor(batch.document_ids)
        # The probability of the mask token is zero, so a mask token in the data can be no target.
        can_be_target = predictable & (batch.tokens != config.mask_token_id)
        if config.mask_count == "exact" and draw.timestep is None:
            noised, segment_timesteps = noise_exactly(can_be_target, segments, segment_timesteps, words[:, 0])
            timesteps = _at_tokens(segment_timesteps, segments)
        else:
            noised = self.noised_tokens(batch.tokens, timesteps, words[:, 0])
        if config.complementary and draw.timestep is None:
            # Where the first sample of a pair is noised, the second sample is not noised. The noising probability of the second sample is 1
            # minus that of the first.
            is_partner = (batch.sample_indices % 2 == 1)[:, None]
            noised = noised ^ is_partner
            # A process that asks the first word again, which kind of noise it is, gets a small word for a noised token there too.
            words = torch.where(is_partner[:, None], _LARGEST_WORD - words, words)
            segment_timesteps = torch.where(is_partner, 1 - segment_timesteps, segment_timesteps)
            timesteps = _at_tokens(segment_timesteps, segments)
        noised = noised & can_be_target
        return Corruption(
            input_ids=torch.where(noised, self.replacements(batch.tokens, timesteps, words), batch.tokens),
            noised=noised,
            predicted=can_be_target if self.predicts_every_token or trains_every_token(config) else noised,
            predictable=predictable,
            timesteps=timesteps.float().expand_as(batch.tokens).contiguous(),
            segments=segments,
            segment_timesteps=segment_timesteps,
            shift=config.shift,
        )


def trains_every_token(config: DiffusionConfig) -> bool:
    """Return whether tokens that noise has kept have a loss."""
    return config.loss_positions == "all" or config.cross_entropy_weight > 0


def has_predecessor(document_ids: Tensor) -> Tensor:
    """Return which positions are not the first of their document, bool [b, l]; ``document_ids`` as in PackedBatch."""
    start, _ = document_bounds(document_ids)
    return start != torch.arange(document_ids.shape[1], device=document_ids.device)


def _segments(batch: PackedBatch, config: DiffusionConfig) -> Tensor:
    """Return the ordinal inside its sample of the segment that each token belongs to, int64 [b, l]."""
    if config.timestep_per == "block":
        assert config.block_size is not None
        return block_ordinals(batch.document_ids, config.block_size, config.block_index)
    if config.timestep_per == "document":
        return batch.document_ids.clamp_min(0).to(torch.int64)
    return torch.zeros_like(batch.tokens)


def _at_tokens(values: Tensor, segments: Tensor) -> Tensor:
    """Return the value of each token's segment, [b, l]. If a sample has a single value, the result has the shape [b, 1], which
    broadcasts."""
    return values if values.shape[1] == 1 else values.gather(1, segments)
