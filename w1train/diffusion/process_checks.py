"""The rules of the noise process's own fields, of one stage of the schedule.

The configuration cannot import processes, so ``w1train.registered_names`` calls these rules.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import torch

from w1train.config.errors import Problem, listing, show, unknown_name
from w1train.config.schema import Config, DiffusionConfig
from w1train.diffusion.process import NoiseProcess
from w1train.diffusion.processes import noise_process
from w1train.diffusion.schedules import SCHEDULES

_TIMES = torch.sigmoid(torch.linspace(-14, 14, 2001, dtype=torch.float64))
"""Timesteps from 1e-6 to 1 - 1e-6, close together near both ends, where noise begins and ends."""
_MOST_IDS = 64
"""Most ids whose noise is looked at. All ordinary ids have the same noise in every process that comes with w1train."""


def process_problems(config: Config) -> Iterator[Problem]:
    """Yield what is wrong with the fields of a process that is registered. A causal process has no noise."""
    diffusion = config.diffusion
    if diffusion.noise_schedule not in SCHEDULES:
        yield unknown_name("diffusion.noise_schedule", diffusion.noise_schedule, SCHEDULES)
        return
    of_ranges = list(_range_problems(diffusion))
    yield from of_ranges
    process = noise_process(diffusion)
    if process.is_causal:
        return
    if diffusion.noise_schedule not in process.schedules:
        valid = f"{listing(process.schedules)}, the schedules of {process.name}"
        yield Problem("diffusion.noise_schedule", diffusion.noise_schedule, valid, f"diffusion.noise_schedule={process.schedules[0]}")
    yield from _epsilon_problems(diffusion, process)
    if process.needs_noise_ids:
        yield from _noise_id_problems(config, process)
        # The other checks look at the noise that the process has with valid ids.
        process = noise_process(dataclasses.replace(diffusion, num_noise_ids=config.model.vocab_size))
    yield from process.problems(config)
    if not of_ranges:
        yield from _mass_problems(config, process)
        yield from _end_problems(diffusion, process)
        yield from _complement_problems(diffusion, process)
        yield from _embedding_noise_problems(diffusion, process)


def _range_problems(diffusion: DiffusionConfig) -> Iterator[Problem]:
    for name, schedule in (("schedule_sigma", "geometric"), ("schedule_gamma", "gaussian_argmax")):
        low, high = getattr(diffusion, f"{name}_min"), getattr(diffusion, f"{name}_max")
        if diffusion.noise_schedule == schedule and low >= high:
            yield Problem(f"diffusion.{name}_min", show(low), f"a number below diffusion.{name}_max ({show(high)})")


def _epsilon_problems(diffusion: DiffusionConfig, process: NoiseProcess) -> Iterator[Problem]:
    """Report an epsilon that would have no effect."""
    has_own_alpha = process.schedules == ("linear",)
    if diffusion.schedule_epsilon > 0 and (has_own_alpha or diffusion.noise_schedule in ("geometric", "gaussian_argmax")):
        owner = process.name if has_own_alpha else f"the schedule {diffusion.noise_schedule}"
        valid = f"0, because {owner} has ends of its own"
        yield Problem("diffusion.schedule_epsilon", show(diffusion.schedule_epsilon), valid, "diffusion.schedule_epsilon=0")


def _noise_id_problems(config: Config, process: NoiseProcess) -> Iterator[Problem]:
    """Report ids of the noise that are not the ids that the model can predict, over which the bound adds up."""
    diffusion, vocab_size = config.diffusion, config.model.vocab_size
    num, mask = diffusion.num_noise_ids, diffusion.mask_token_id
    is_last = mask == vocab_size - 1 and diffusion.exclude_mask_logit
    are_all = num == vocab_size or (is_last and num == mask)
    if not (are_all if process.bound == "kl_is" else 0 < num <= vocab_size):
        what = "the bound is that of noise on every id that the model can predict" if process.bound == "kl_is" else "or less"
        valid = f"model.vocab_size ({vocab_size}): {what}"
        found = "0 (not set)" if num == 0 else show(num)
        yield Problem("diffusion.num_noise_ids", found, valid, f"diffusion.num_noise_ids={vocab_size}")
    if process.masks_are_noise and not diffusion.exclude_mask_logit:
        valid = f"true, because in {process.name} the mask token is noise that no text has"
        yield Problem("diffusion.exclude_mask_logit", "false", valid, "diffusion.exclude_mask_logit=true")


def _mass_problems(config: Config, process: NoiseProcess) -> Iterator[Problem]:
    """Report a step of noise with a negative probability: c_t(v) / alpha_t falls with t for an id v (GIDD, arXiv 2503.04482, section 3)."""
    mask = config.diffusion.mask_token_id
    ids = torch.tensor([mask, *(i for i in range(min(_MOST_IDS, config.model.vocab_size)) if i != mask)])
    noise = process.noise(_TIMES[:, None], ids)
    growth = (noise / process.alpha(_TIMES)[:, None]).diff(dim=0)
    falls = growth < -1e-9 * noise[1:]
    if falls.any():
        at, column = (int(index) for index in falls.nonzero()[0])
        key = f"diffusion.{process.mass_field}"
        found = f"{show(getattr(config.diffusion, process.mass_field))}, with which noise would be taken back at t = {_TIMES[at]:.3g}"
        valid = f"a value with which c_t(v) / alpha_t falls for no id v; it falls for id {int(ids[column])}"
        yield Problem(key, found, valid, process.mass_remedy)


def _end_problems(diffusion: DiffusionConfig, process: NoiseProcess) -> Iterator[Problem]:
    """Report a first or last t at which the weight of the bound is not a finite number."""
    # In discrete time the weight of each step is the number of steps.
    if process.bound != "kl_is" or diffusion.num_timesteps > 0:
        return
    word = int(diffusion.mask_token_id == 0)
    # A token that noise has kept, another word, and the mask token if noise puts it there.
    pairs = [(word, word), (word, word + 2), *([(diffusion.mask_token_id, word)] if process.masks_are_noise else [])]
    inputs, targets = torch.tensor(pairs).T
    for field, remedy in (("t_min", "0.0001"), ("t_max", "0.9999")):
        t = getattr(diffusion, field)
        times = torch.full((len(pairs),), t, dtype=torch.float32)  # as the loss gets it
        is_reached = (inputs == targets) | (process.noise(times.double(), inputs) > 0)
        if not process.bound_weight(times, inputs, targets)[is_reached].isfinite().all():
            valid = f"a number inside of (0, 1): at its end, the weight of the bound of {process.name} is infinite"
            yield Problem(f"diffusion.{field}", show(t), valid, f"diffusion.{field}={remedy} (GIDD)")


def _complement_problems(diffusion: DiffusionConfig, process: NoiseProcess) -> Iterator[Problem]:
    """Report pairs whose second sample would not be noised as a sample at its t is."""
    if not diffusion.complementary:
        return
    both = process.noising_probability(_TIMES) + process.noising_probability(1 - _TIMES)
    if not process.has_complements or not torch.allclose(both, torch.ones_like(both), rtol=0, atol=1e-6):
        valid = f"false: in {process.name} with this schedule, a sample at 1 - t does not noise just what a sample at t leaves"
        yield Problem("diffusion.complementary", "true", valid, "diffusion.complementary=false")


def _embedding_noise_problems(diffusion: DiffusionConfig, process: NoiseProcess) -> Iterator[Problem]:
    """Report noise on the embeddings of masks in a process without masks."""
    if diffusion.mask_embedding_noise > 0 and process.predicts_every_token and not process.masks_are_noise:
        valid = f"0, because {process.name} has no masks whose embeddings could have noise"
        yield Problem("diffusion.mask_embedding_noise", show(diffusion.mask_embedding_noise), valid, "diffusion.mask_embedding_noise=0")
