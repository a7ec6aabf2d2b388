"""Batches of skipped steps, written to files that people can look at: ``bad_batches/step_N/rank_R.npz`` and a readable ``rank_R.json``."""

from __future__ import annotations

import json
import logging
import math
import socket
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from w1train.diffusion.corruption import NoisyBatch
from w1train.runtime.files import replace_file, write_text

logger = logging.getLogger(__name__)


def keep(batches: Iterable[NoisyBatch], kept: list[NoisyBatch]) -> Iterator[NoisyBatch]:
    """Yield the batches, and add each of them to ``kept``."""
    for batch in batches:
        kept.append(batch)
        yield batch


def step_directory(bad_batches: Path, step: int) -> Path:
    """Return where the batch of a skipped step is, in the run's ``bad_batches``."""
    return bad_batches / f"step_{step}"


def write_bad_batch(
    directory: Path, step: int, reason: str, values: Mapping[str, Any], batches: Sequence[NoisyBatch], parameters: Sequence[str]
) -> None:
    """Write this rank's part of the batch of a skipped step. If it cannot be written, the run warns.

    Args:
        directory: the run's ``bad_batches``.
        batches: this rank's micro-batches; the arrays have the samples of all of them along the first dimension.
        parameters: names of the parameters whose gradients are NaN or infinite.
    """
    path = step_directory(directory, step) / f"rank_{dist.get_rank()}"
    samples = torch.cat([batch.sample_indices for batch in batches])
    description = {
        "step": step,
        "reason": reason,
        "rank": dist.get_rank(),
        "host": socket.gethostname(),
        # JSON has no NaN.
        **{name: value if math.isfinite(value) else str(value) for name in ("loss", "grad_norm") for value in (float(values[name]),)},
        "sample_indices": samples.tolist(),
        "timesteps": [batch.segment_timesteps.tolist() for batch in batches],
        "nonfinite_parameters": list(parameters),
    }
    names = [*batches[0].names("token"), *batches[0].names("sample")]
    arrays: dict[str, Any] = {name: _all_samples(batches, name) for name in names}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with replace_file(path.with_suffix(".npz")) as file:
            np.savez(file, **arrays)
        write_text(path.with_suffix(".json"), json.dumps(description, indent=1))
    except OSError as error:
        logger.warning("could not write the bad batch of step %d aside: %s", step, error)


def _all_samples(batches: Sequence[NoisyBatch], name: str) -> np.ndarray:
    """Return a field of all micro-batches as one array, [samples, l]."""
    return torch.cat([getattr(batch, name) for batch in batches]).cpu().numpy()
