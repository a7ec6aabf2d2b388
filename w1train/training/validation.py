"""Validation on fixed samples with fixed noise at fixed timesteps, so that two numbers differ only by what the model learned.

The ELBO is an integral over t. The timesteps are the midpoints of a quadrature of this integral, so the result has no variance from random
t. Each timestep has its own noise. Where the integral does not begin at text or end at noise alone, the end terms of the bound are added.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from w1train.config.schema import Config
from w1train.data.batch import PackedBatch
from w1train.diffusion.corruption import corrupt_at
from w1train.diffusion.processes import noise_process
from w1train.engine.learned_rates import current_noise_rates
from w1train.objectives.description import block_size
from w1train.objectives.integral import Integral, integral_of, is_exact_at_the_end, needs_reconstruction, prior_divergence
from w1train.objectives.named_sums import NamedSums
from w1train.objectives.objective import objective_at
from w1train.objectives.preference import PAIR_METRICS, TextScores, preference_metrics
from w1train.training.companions import Companion
from w1train.training.forward import sum_micro_batches
from w1train.training.training_data import ValidationData, ValidationSet

# The noise of validation is the same for every run, whatever its seed, so runs can be compared.
_NOISE_SEED = 0
_RECONSTRUCTION: dict[str, Any] = {
    **{"loss": "reconstruction", "loss_positions": "auto", "normalizer": "tokens", "weight": "constant"},
    **{"weight_min": 0.0, "weight_max": None, "cross_entropy_weight": 0.0, "autoregressive_weight": 0.0, "preference_draws": 0},
    "confidence_weight": 0.0,
}
"""The objective whose loss is the first end term of the bound."""
_NAMED_METRICS = ("elbo", "elbo_bits_per_byte", "masked_cross_entropy", *PAIR_METRICS)


class HasChunks(Protocol):
    """An owner of a model's stages: w1train.engine.building.TrainedModel or w1train.inference.predictor.Predictor."""

    @property
    def chunks(self) -> Sequence[torch.nn.Module]: ...


def validate(config: Config, model: HasChunks, data: ValidationData, reference: Companion | None = None) -> dict[str, Any]:
    """Score the validation samples at every timestep of ``validation.timesteps``. Every rank calls this.

    Args:
        reference: the model that preferences are compared with; None = pairs of replies are not compared.

    Returns:
        elbo (nats per token), elbo_bits_per_byte, masked_cross_entropy (nats per masked token), loss_by_t (one per timestep), and
        the ELBO at each of ``validation.block_sizes`` as elbo_at_block_size/B and elbo_bits_per_byte_at_block_size/B. For each further
        validation set elbo/NAME, elbo_bits_per_byte/NAME and masked_cross_entropy/NAME. A stage of preferences adds PAIR_METRICS.
    """
    assert data.validation is not None
    started = time.perf_counter()
    for chunk in model.chunks:
        chunk.eval()
    found: dict[str, Any] = {}
    for name, validation in data.validation_sets.items():
        scored = _score_set(config, model, validation, reference, name)
        found |= scored if name == "" else {f"{key}/{name}": scored[key] for key in _NAMED_METRICS if key in scored}
    for chunk in model.chunks:
        chunk.train()
    return {**found, "time/seconds": time.perf_counter() - started}


def _score_set(config: Config, model: HasChunks, validation: ValidationSet, reference: Companion | None, name: str) -> dict[str, Any]:
    batches = _fill_last_group(config, list(validation.batches()))
    if config.diffusion.preference_draws:
        config = _with_texts(config, validation.num_samples)
    passes = _passes(config, model.chunks, batches)
    scores = _scores(config, model, batches, passes)
    if config.diffusion.preference_draws and reference is not None:
        scores |= _pair_scores(config, passes, reference, batches, name)
    others: dict[str, float | None] = {}
    # An autoregressive stage has not seen a mask token.
    for size in () if noise_process(config.diffusion).is_causal else config.validation.block_sizes:
        blocks = _with_blocks(config, size)
        elbo = _scores(blocks, model, batches, _passes(blocks, model.chunks, batches))["elbo"]
        others |= {f"elbo_at_block_size/{size}": elbo, f"elbo_bits_per_byte_at_block_size/{size}": validation.bits_per_byte(elbo)}
    return {"elbo_bits_per_byte": validation.bits_per_byte(scores["elbo"]), **scores, **others}


def _with_blocks(config: Config, block_size: int) -> Config:
    """Return the configuration in which the same model factorises the text into other blocks. Validation always shows the model the whole
    document, and has one timestep for each sample, even if training differs."""
    diffusion = dataclasses.replace(config.diffusion, block_size=block_size, autoregressive_weight=0.0)
    return dataclasses.replace(config, diffusion=diffusion)


def _with_texts(config: Config, num_texts: int) -> Config:
    """Return the configuration in which each sample is the only draw of its text in a pass, and all samples are one global batch."""
    diffusion = dataclasses.replace(config.diffusion, preference_draws=1)
    return dataclasses.replace(config, diffusion=diffusion, training=dataclasses.replace(config.training, global_batch_size=num_texts))


def _passes(config: Config, chunks: Sequence[torch.nn.Module], batches: list[PackedBatch]) -> list[NamedSums]:
    """Return the sums of a pass at each timestep of the quadrature."""
    integral = integral_of(config.diffusion, config.validation.timesteps)
    # If tokens are predicted one at a time, the likelihood at t = 1 is the ELBO. It has no variance from masks, and it does not need a t at
    # which such a stage may never have trained. One pass is therefore enough for all t.
    if block_size(config) == 1 and is_exact_at_the_end(config.diffusion):
        return [_pass(config, chunks, batches, 1.0, draw=1)] * len(integral.timesteps)
    return [_pass(config, chunks, batches, t, draw=draw) for draw, t in enumerate(integral.timesteps, start=1)]


def _scores(config: Config, model: HasChunks, batches: list[PackedBatch], passes: list[NamedSums]) -> dict[str, Any]:
    num_timesteps = len(config.validation.timesteps)
    integral = integral_of(config.diffusion, config.validation.timesteps)
    objective = objective_at(config)
    by_timestep = [objective.metrics(sums) for sums in passes]
    elbo = sum(metrics["elbo"] * rate for metrics, rate in zip(by_timestep, integral.rates, strict=True)) / num_timesteps
    cross_entropies = [metrics["masked_cross_entropy"] for metrics in by_timestep]
    masked = sum(metrics["mask_ratio"] for metrics in by_timestep)
    weighted = sum(metrics["masked_cross_entropy"] * metrics["mask_ratio"] for metrics in by_timestep)
    return {
        "elbo": elbo + _end_terms(config, model, batches, integral),
        "masked_cross_entropy": weighted / masked if masked else 0.0,
        "loss_by_t": cross_entropies,
    }


def _pair_scores(config: Config, passes: list[NamedSums], reference: Companion, batches: list[PackedBatch], name: str) -> dict[str, float]:
    """Return the metrics of the pairs, whose ELBOs are the quadrature over t. Those of the reference on a validation set never change, so
    they are computed once. ``name`` is that of the set."""
    key = (name, config.diffusion.block_size)
    if key not in reference.kept:
        with reference.active() as chunks:
            reference.kept[key] = _text_bounds(config, _passes(config, chunks, batches))
    texts = TextScores(_text_bounds(config, passes), reference.kept[key], passes[0]["text_tokens"].cpu())
    return preference_metrics(texts, config.diffusion.preference_beta)


def _text_bounds(config: Config, passes: list[NamedSums]) -> Tensor:
    """Return the negative ELBO of each text in nats, float64 [texts]."""
    rates = integral_of(config.diffusion, config.validation.timesteps).rates
    weighted = [sums["text_bounds"] * rate for sums, rate in zip(passes, rates, strict=True)]
    return (torch.stack(weighted).sum(dim=0) / len(weighted)).cpu()


@torch.no_grad()
def _pass(config: Config, chunks: Sequence[torch.nn.Module], batches: list[PackedBatch], timestep: float, *, draw: int) -> NamedSums:
    rates = current_noise_rates(chunks)
    noisy = (corrupt_at(batch, config.diffusion, _NOISE_SEED, timestep, draw=draw, rates=rates) for batch in batches)
    return sum_micro_batches(config, list(chunks), noisy, len(batches), training=False)[0]


def _end_terms(config: Config, model: HasChunks, batches: list[PackedBatch], integral: Integral) -> float:
    """Return the end terms of the bound in nats per token: the cross-entropy of the text given the noisy text at the smallest t, by one
    more pass, and the divergence of the prior. Both are 0 where the process goes from text to noise alone."""
    diffusion = config.diffusion
    process = noise_process(diffusion)
    if process.is_causal:
        return 0.0
    num_ids = config.model.vocab_size - (1 if diffusion.exclude_mask_logit else 0)
    prior = prior_divergence(process, integral.last, num_ids, diffusion.mask_token_id)
    if not needs_reconstruction(process, integral.first):
        return prior
    of_text = dataclasses.replace(config, diffusion=dataclasses.replace(diffusion, **_RECONSTRUCTION))
    sums = _pass(of_text, model.chunks, batches, integral.first, draw=1 + len(integral.timesteps))
    return prior + objective_at(of_text).metrics(sums)["loss"]


def scores(record: Mapping[str, Any]) -> dict[str, float]:
    """Return the numbers of a validation record by which checkpoints are ranked, by the names of their metrics."""
    return {name: value for name, value in record.items() if isinstance(value, float) and not name.startswith("time/")}


def _fill_last_group(config: Config, batches: list[PackedBatch]) -> list[PackedBatch]:
    """Return the batches, and after them batches of padding, which add nothing to any sum. The schedule of virtual pipeline stages takes
    micro-batches in groups of as many as there are stages."""
    parallel = config.parallel
    if parallel.virtual_pipeline == 1:
        return batches
    return batches + [batches[0].padding_like()] * (-len(batches) % parallel.pipeline)
