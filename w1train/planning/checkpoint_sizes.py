"""The size of a checkpoint, and how many checkpoints a run has at a time."""

from __future__ import annotations

import itertools
import math

from w1train.config.schema import Config
from w1train.config.schema_operation import CheckpointConfig
from w1train.model.flops import num_parameters
from w1train.planning.parameters import num_matrix_elements, num_trained_parameters
from w1train.planning.state import FP32_BYTES, PRECISION_BYTES


def checkpoint_bytes(config: Config) -> int:
    """Return the bytes of the tensors of a checkpoint: weights, masters and moments, of which frozen weights have only the first.
    The other files have some kilobytes.

    In fp32 the weights are their own masters, which the distributed optimizer nevertheless saves.
    """
    precision = config.training.precision
    has_masters = precision == "bf16" or config.parallel.distributed_optimizer
    second_moments = FP32_BYTES * num_matrix_elements(config.model) if config.optimizer.name == "muon" else 0
    weights, states = PRECISION_BYTES[precision], FP32_BYTES * (3 if has_masters else 2)
    model, adapters = config.model, config.adapters
    return num_parameters(model, adapters) * weights + num_trained_parameters(model, adapters) * states - second_moments


def most_checkpoints(settings: CheckpointConfig, num_steps: int) -> int:
    """Return how many checkpoints a run has at a time, at least: those that it keeps, and the one that is written before an old one is
    removed. The best checkpoints may be among the newest, and are not counted."""
    interval, forever = settings.interval, settings.keep_every
    num_saved = math.ceil(num_steps / interval)
    num_forever = num_steps // math.lcm(interval, forever) if forever else 0
    saved = (step if step <= num_steps else num_steps for step in range(num_saved * interval, 0, -interval))
    num_newest = sum(not forever or step % forever != 0 for step in itertools.islice(saved, settings.keep))
    return min(num_saved, num_forever + num_newest + 1)
